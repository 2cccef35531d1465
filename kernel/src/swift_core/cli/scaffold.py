"""`swift-core plugin new`: writes a plugin that installs, passes its contract and its linter as it is.

A kind's template is `scaffold/KIND.tmpl`: settings in TOML, then files, each after a line `=== PATH`. `common.tmpl` holds the
files that all kinds share. Placeholders are `string.Template`'s.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from string import Template
from typing import Any

from swift_core import __version__
from swift_core.api import API, KINDS
from swift_core.errors import RequestError, did_you_mean
from swift_core.index import build_index, normalise

TEMPLATES = Path(__file__).parent.parent / "scaffold"
NAME = re.compile(r"[a-z]([a-z0-9]|-(?=[a-z0-9])){0,29}")


def write_plugin(name: str, kind: str, folder: Path) -> Path:
    """Write the plugin `swift-plugin-NAME`, offering NAME of a kind such as `tuner`, into `folder`; returns the folder.

    Raises RequestError for an unknown kind, a name that cannot be a distribution's or is taken, and a folder that holds files.
    """
    if kind not in KINDS.values():
        near = did_you_mean(kind, KINDS.values())
        raise RequestError(f"--kind: no kind {kind!r}.{near or ' Kinds: ' + ', '.join(KINDS.values()) + '.'}")
    name = name.removeprefix("swift-plugin-")
    if not NAME.fullmatch(name):
        near = re.sub(r"[^a-z0-9]+", "-", normalise(name)).strip("-0123456789")[:30].strip("-")
        raise RequestError(
            f"{name!r} cannot name a plugin: use at most 30 lower-case letters, digits and single hyphens, a letter first."
            + (f" Did you mean: {near}?" if near else "")
        )
    plugin = build_index().plugins.get(f"swift-plugin-{name}")
    if plugin is not None:
        raise RequestError(f"swift-plugin-{name} {plugin.version} is installed already; choose another name")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise RequestError(f"{folder} exists already; choose another name or --output")
    try:
        for path, text in render(name, kind).items():
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    except OSError as err:
        raise RequestError(f"{folder} cannot be written: {err.strerror}") from None
    return folder


def render(name: str, kind: str) -> dict[str, str]:
    """The plugin's files: texts by path."""
    head, own = _read(TEMPLATES / f"{kind}.tmpl")
    settings: dict[str, Any] = tomllib.loads(head)
    table = next(table for table, singular in KINDS.items() if singular == kind)
    major, minor, _ = __version__.split(".")
    rows = [f"| `{option}` | {default} | {text} |" for option, default, text in settings.get("options", [])]
    values = {
        "name": name,
        "package": f"swift_plugin_{name.replace('-', '_')}",
        "module": name.replace("-", "_"),
        "Class": "".join(part.capitalize() for part in name.split("-")),
        "kind": kind,
        "api": f"{API[0]}.{API[1]}",
        "core": f"swift-core>={major}.{minor},<{major}.{int(minor) + 1}",
        "dependencies": "".join(f', "{item}"' for item in settings.get("dependencies", [])),
        "test_dependencies": "".join(f', "{item}"' for item in settings.get("test", [])),
        "options": "\n".join(["| option | default | meaning |", "|---|---|---|", *rows]) if rows else "It has none.",
    }
    values |= {key: Template(settings[key]).substitute(values) for key in ("summary", "limits", "use", "manifest")}
    values["entry"] = Template(settings.get("entry", _ENTRY)).substitute(values, table=table)
    _, shared = _read(TEMPLATES / "common.tmpl")
    return {Template(path).substitute(values): Template(text).substitute(values) for path, text in (shared | own).items()}


_ENTRY = """hooks   = "$package.hooks"

[[$table]]
id      = "$name"
summary = "$summary"
config  = "$package.config:Config"
$manifest"""


def _read(file: Path) -> tuple[str, dict[str, str]]:
    """A template's settings, and its files by path."""
    head, *rest = re.split(r"^=== (.+)\n", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return head, {
        path: text.strip("\n") + "\n" if text.strip() else "" for path, text in zip(rest[::2], rest[1::2], strict=True)
    }
