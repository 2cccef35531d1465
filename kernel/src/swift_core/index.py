"""Finds installed plugins without importing any: reads `entry_points.txt` of each distribution on sys.path.

This is the first wall: whatever is wrong with a plugin, it becomes BROKEN with one line of reason, and the others go on.
`importlib.metadata` gives the same answer at ten times the cost, which every command would pay.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from swift_core import __version__
from swift_core.api import describe_mismatch
from swift_core.manifest import Entry, Manifest, ManifestError, read_manifest

GROUP = "swift.manifest"
Locate = Callable[[str], str | None]
READY, DISABLED, INCOMPATIBLE, BROKEN, CONFLICT = "READY", "DISABLED", "INCOMPATIBLE", "BROKEN", "CONFLICT"


@dataclass(slots=True)
class Plugin:
    """An installed plugin distribution. `reason` says why it is not READY; a CONFLICT is usable through `provider`."""

    name: str
    version: str
    status: str = READY
    reason: str = ""
    manifest: Manifest | None = None
    package: str = ""

    @property
    def usable(self) -> bool:
        return self.status in (READY, CONFLICT)

    @property
    def entries(self) -> tuple[Entry, ...]:
        return self.manifest.entries if self.manifest else ()


@dataclass(slots=True)
class PluginIndex:
    """All installed plugins by name, and the version of every installed distribution by normalised name."""

    plugins: dict[str, Plugin] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def normalise(name: str) -> str:
    """A distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def build_index(path: list[str] | None = None, disabled: str | None = None) -> PluginIndex:
    """Scan `path` (sys.path). `disabled` is a comma-separated list of plugin names (SWIFT_DISABLE_PLUGINS)."""
    if disabled is None:
        disabled = os.environ.get("SWIFT_DISABLE_PLUGINS", "")
    blocked = {plugin_name(part) for part in disabled.split(",") if part.strip()}
    index = PluginIndex()
    packages: dict[str, str] = {}  # the first folder on the path that holds a name, by name
    declared: list[tuple[str, str, str, str]] = []
    for folder in path if path is not None else sys.path:
        names = _listing(folder or ".")
        for name in names:
            packages.setdefault(name, folder or ".")
        for name, version, info in _distributions(folder or ".", names):
            if name in index.versions:
                continue  # the first on the path wins, as it does for import
            index.versions[name] = version
            declared += [(name, version, module, file) for module, file in _manifest_entry_points(info)]
    locate = partial(_package, packages=packages, path=path)
    for name, version, module, file in declared:
        index.plugins[name] = _read_plugin(name, version, module, file, blocked, locate)
    index.plugins = dict(sorted(index.plugins.items()))
    _mark_conflicts(index)
    return index


def plugin_name(text: str) -> str:
    """`lora` and `swift-plugin-lora` name the same plugin."""
    name = normalise(text.strip())
    return name if name.startswith("swift-plugin-") else f"swift-plugin-{name}"


def _listing(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _package(module: str, packages: dict[str, str], path: list[str] | None) -> str | None:
    """The folder of a top-level package: where the path's listings show it, else where `find_spec`, far slower, does."""
    folder = os.path.join(packages.get(module, ""), module)
    if module in packages and f"{module}.py" not in packages and os.path.isfile(os.path.join(folder, "__init__.py")):
        return folder
    spec = find_spec(module) if path is None else PathFinder.find_spec(module, path)
    return next(iter(spec.submodule_search_locations), None) if spec and spec.submodule_search_locations else None


def _distributions(folder: str, names: list[str]) -> list[tuple[str, str, str]]:
    """(normalised name, version, info folder) of each distribution in a folder."""
    found = []
    for name in names:
        if name.endswith((".dist-info", ".egg-info")):
            parts = name.rsplit(".", 1)[0].split("-")
            found.append((normalise(parts[0]), parts[1] if len(parts) > 1 else "", os.path.join(folder, name)))
    return found


def _manifest_entry_points(info: str) -> list[tuple[str, str]]:
    """(top-level package, manifest file) pairs that a distribution declares."""
    try:
        with open(os.path.join(info, "entry_points.txt"), encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError):
        return []
    if f"[{GROUP}]" not in text:
        return []
    section = text.split(f"[{GROUP}]", 1)[1].split("\n[", 1)[0]
    values = [line.partition("=")[2].strip() for line in section.splitlines() if "=" in line]
    return [(module, file or "swift_plugin.toml") for module, _, file in (value.partition(":") for value in values)]


def _read_plugin(name: str, version: str, module: str, manifest_file: str, blocked: set[str], locate: Locate) -> Plugin:
    plugin = Plugin(name, version, package=module)
    if name in blocked or plugin_name(name) in blocked:
        plugin.status, plugin.reason = DISABLED, "switched off by SWIFT_DISABLE_PLUGINS"
        return plugin
    try:
        if "." in module:
            raise ManifestError(f"its manifest must sit in a top-level package, not in {module!r}")
        folder = locate(module)
        if folder is None:
            raise ManifestError(f"its package {module!r} cannot be found")
        plugin.manifest = read_manifest(Path(folder) / manifest_file)
        if normalise(plugin.manifest.name) != name:
            raise ManifestError(f"its manifest says name = {plugin.manifest.name!r}; it must be the distribution's, {name!r}")
        mismatch = describe_mismatch(name, version, plugin.manifest.api, __version__)
        if mismatch:
            plugin.status, plugin.reason = INCOMPATIBLE, mismatch
    except Exception as err:  # the first wall: one plugin's fault stays that plugin's
        plugin.status, plugin.reason = BROKEN, str(err) if isinstance(err, ManifestError) else f"{type(err).__name__}: {err}"
    return plugin


def _mark_conflicts(index: PluginIndex) -> None:
    owners: dict[tuple[str, str], list[Plugin]] = {}
    for plugin in index.plugins.values():
        for entry in plugin.entries if plugin.usable else ():
            owners.setdefault((entry.kind, entry.id), []).append(plugin)
    for (kind, ident), plugins in owners.items():
        for plugin in plugins if len(plugins) > 1 else ():
            others = ", ".join(f"{other.name} {other.version}" for other in plugins if other is not plugin)
            entry = next(entry for entry in plugin.entries if (entry.kind, entry.id) == (kind, ident))
            plugin.status = CONFLICT
            plugin.reason = f"{entry.singular} {ident!r} is also offered by {others}; set {entry.singular}.provider"
