"""Answers "who offers this id?" from the index, and says what to do when nobody, somebody broken, or two do."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from swift_core.api import KINDS
from swift_core.errors import PluginLoadError, RequestError, did_you_mean
from swift_core.index import READY, Plugin, PluginIndex, plugin_name
from swift_core.manifest import Entry


@dataclass(frozen=True, slots=True)
class Contribution:
    """An entry with the plugin that offers it."""

    entry: Entry
    plugin: Plugin

    @property
    def id(self) -> str:
        return self.entry.id

    @property
    def address(self) -> str:
        """`tuner.lora`, as error messages name it."""
        return f"{self.entry.singular}.{self.entry.id}"


class Registry:
    """Contributions by kind and id. Kinds are the manifest's tables: "models", "tuners", ..."""

    def __init__(self, index: PluginIndex) -> None:
        self.index = index

    @cached_property
    def _known(self) -> dict[str, dict[str, str]]:
        """Ids of this project's plugins by kind, with the distribution that brings each."""
        return tomllib.loads((Path(__file__).parent / "known.toml").read_text(encoding="utf-8"))

    def all(self, kind: str) -> list[Contribution]:
        """Usable contributions of a kind, sorted by id."""
        plugins = self.index.plugins.values()
        found = [Contribution(entry, plugin) for plugin in plugins if plugin.usable for entry in plugin.entries]
        return sorted((c for c in found if c.entry.kind == kind), key=lambda c: (c.id, c.plugin.name))

    def has(self, kind: str, ident: str) -> bool:
        return any(c.id == ident for c in self.all(kind))

    def find(self, kind: str, ident: str, provider: str | None = None) -> Contribution:
        """The one contribution of an id. Raises RequestError or PluginLoadError, naming what mends it."""
        offers = [c for c in self.all(kind) if c.id == ident]
        return self._one(kind, repr(ident), offers, provider) or self._fail(kind, ident)

    def generic(self, kind: str, provider: str | None = None) -> Contribution:
        """The contribution that serves any source of a kind: any local model folder, any data file."""
        offers = [c for c in self.all(kind) if c.entry.options.get("generic")]
        default = "transformers" if kind == "models" else "huggingface"
        return self._one(kind, "of any source", offers, provider) or self._fail(kind, default)

    def loader(self, architecture: str | None, provider: str | None = None, model_type: str | None = None) -> Contribution:
        """Who loads an architecture: the one family that sets `loads = true` for it, else the generic loader. A `provider`
        that is a family without a loader of its own leaves it to the generic one."""
        families = self.families(architecture, model_type)
        own = [c for c in families if c.entry.options.get("loads")]
        if provider and any(_same(provider, c) and c not in own for c in families):
            return self.generic("models")
        if provider:
            own += [c for c in self.all("models") if c.entry.options.get("generic")]
        return self._one("models", f"of architecture {architecture!r}", own, provider) or self.generic("models")

    def _one(self, kind: str, what: str, offers: list[Contribution], provider: str | None) -> Contribution | None:
        """The offer that `provider` names, or the only one; None without offers."""
        singular = KINDS[kind]
        names = [f"{c.plugin.name} {c.plugin.version}" for c in offers]
        if provider:
            offers = [c for c in offers if _same(provider, c)]
            if not offers:
                have = ", ".join(names) or "none"
                raise RequestError(f"{singular} {what} has no provider {provider!r}. Providers installed: {have}.")
        if len(offers) > 1:
            raise RequestError(
                f"{singular} {what} is offered by {' and by '.join(names)}; "
                f"choose with {singular}.provider=NAME, or uninstall one."
            )
        return offers[0] if offers else None

    def families(self, architecture: str | None, model_type: str | None = None) -> list[Contribution]:
        """The installed families that list an architecture; where none does, those that list the model type."""
        for key, value in (("architectures", architecture), ("model_types", model_type)):
            if found := [c for c in self.all("models") if value is not None and value in c.entry.options.get(key, ())]:
                return found
        return []

    def family(
        self, architecture: str | None, model_type: str | None = None, provider: str | None = None
    ) -> Contribution | None:
        """The family of an architecture. Two that say the same of it are as good as one; else `provider` must choose."""
        found = self.families(architecture, model_type)
        if provider:
            found = [c for c in found if _same(provider, c)] or found[:1]
        if any(_told(c) != _told(found[0]) for c in found[1:]):
            self._one("models", f"of architecture {architecture!r}", found, None)  # raises, naming both
        return found[0] if found else None

    def checkpoint(self, name: str) -> tuple[Contribution, dict[str, Any]] | None:
        """The family and table row of a published checkpoint, by its hub id or its ModelScope id."""
        for key in ("id", "modelscope"):
            for contribution in self.all("models"):
                if name in self._table(contribution):
                    for row in self.checkpoints(contribution):
                        if row.get(key) == name:
                            return contribution, row
        return None

    def checkpoints(self, contribution: Contribution) -> list[dict[str, Any]]:
        """The rows of a model entry's `checkpoints` table, each with at least `id`: a JSON object a line, or a TOML file
        of `[[checkpoints]]`."""
        text = self._table(contribution)
        if str(contribution.entry.options.get("checkpoints")).endswith(".toml"):
            return list(tomllib.loads(text).get("checkpoints", []))
        rows: list[dict[str, Any]] = json.loads(f"[{','.join(text.splitlines())}]")
        return rows

    def _table(self, contribution: Contribution) -> str:
        """The text of a `checkpoints` table; empty where an entry has none. Raises RequestError."""
        file, manifest = contribution.entry.options.get("checkpoints"), contribution.plugin.manifest
        if not file or manifest is None:
            return ""
        try:
            return (manifest.path.parent / str(file)).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as err:
            raise RequestError(f"the table {file} of {contribution.plugin.name} cannot be read: {err}") from None

    def ids(self, kind: str) -> list[str]:
        """Every id of a kind, installed or only known, for suggestions."""
        return list(dict.fromkeys([*(c.id for c in self.all(kind)), *self._known.get(kind, {})]))

    def missing(self, kind: str, ident: str) -> RequestError | None:
        """What is said of an id whose plugin is not installed, or installed and not usable; None of any other id."""
        if self.has(kind, ident):
            return None
        singular, dist = KINDS[kind], self._known.get(kind, {}).get(ident)
        for plugin in self.index.plugins.values():
            claims = any((entry.kind, entry.id) == (kind, ident) for entry in plugin.entries)
            if not plugin.usable and (claims or dist == plugin.name):
                return PluginLoadError(
                    f"{singular} {ident!r} comes from {plugin.name} {plugin.version}, which is installed but "
                    f"{plugin.status}: {plugin.reason}"
                )
        return RequestError(f"{singular} {ident!r} is not installed. Get it: pip install {dist}") if dist else None

    def _fail(self, kind: str, ident: str) -> NoReturn:
        if lack := self.missing(kind, ident):
            raise lack
        names = ", ".join(dict.fromkeys(c.id for c in self.all(kind))) or f"none (see swift-core {kind} list)"
        unread = ", ".join(plugin.name for plugin in self.index.plugins.values() if not plugin.usable and not plugin.entries)
        hint = f" Installed but not usable: {unread} (see swift-core plugins list)." if unread else ""
        raise RequestError(f"no {KINDS[kind]} {ident!r}.{did_you_mean(ident, self.ids(kind))} Installed: {names}.{hint}")

    def suggestions(self, kind: str) -> list[str]:
        """Distributions of this project that offer a kind: what to install when its list is empty."""
        return list(dict.fromkeys(self._known.get(kind, {}).values()))


def _same(provider: str, contribution: Contribution) -> bool:
    return plugin_name(provider) == plugin_name(contribution.plugin.name)


def _told(contribution: Contribution) -> list[Any]:
    """What a family says of its models beyond their names: where two families differ in it, one must be chosen."""
    return [contribution.entry.options.get(key) for key in ("template", "parts", "thinking", "loads")]


def check_requires(contribution: Contribution) -> str | None:
    """What a contribution's plugin lacks, from installed metadata alone, or None. Nothing is imported."""
    from importlib.metadata import PackageNotFoundError, version

    from packaging.requirements import InvalidRequirement, Requirement

    manifest = contribution.plugin.manifest
    for text in (*(manifest.requires if manifest else ()), *contribution.entry.requires):
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            return f"its manifest has an unreadable requirement, {text!r}"
        if requirement.marker and not requirement.marker.evaluate():
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            return f"it needs {text}, which is not installed. Get it: pip install '{text}'"
        if not requirement.specifier.contains(found, prereleases=True):
            return f"it needs {text}, and {found} is installed. Get it: pip install '{text}'"
    return None


def plugin_faults(plugin: Plugin) -> str:
    """The one-line reason that `plugins list` shows: the index's, or the first missing requirement."""
    if plugin.reason:
        return plugin.reason
    for entry in plugin.entries:
        lack = check_requires(Contribution(entry, plugin))
        if lack:
            return f"{entry.singular} {entry.id!r}: {lack}"
    return ""


def plugin_problem(plugin: Plugin) -> str:
    """`BROKEN: reason`, `LACKS: requirement`; the empty string for a plugin that can be used."""
    fault = plugin_faults(plugin)
    return f"{plugin.status if plugin.status != READY else 'LACKS'}: {fault}" if fault else ""


def read_model_config(folder: Path) -> dict[str, Any]:
    """A model folder's config.json, its `architectures` a list of names. Raises RequestError when it cannot be read."""
    file = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RequestError(f"{folder} holds no config.json: it is not a model folder.") from None
    except (ValueError, OSError) as err:
        raise RequestError(f"{file} cannot be read: {err}") from None
    if not isinstance(config, dict):
        raise RequestError(f"{file} must hold a JSON object, not {type(config).__name__}: is it a model's config.json?")
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RequestError(f"{file}: architectures must be a list of class names, not {json.dumps(names)[:80]}")
    return config
