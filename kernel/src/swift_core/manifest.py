"""Reads and checks a plugin's `swift_plugin.toml`: the plugin's whole face, known without running its code.

Each table of a manifest is a kind; each entry a contribution. Unknown tables and keys are errors, so that a misspelt
one is found by its author and not by a user.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swift_core.api import KINDS, parse_api
from swift_core.errors import did_you_mean

PART_KINDS = ("preparer", "rows", "optimizer", "loss", "metric", "reward", "tool_format", "environment", "logger", "hub")

_COMMON: dict[str, type[Any]] = {"id": str, "summary": str, "requires": list, "config": str, "capabilities": list}
_EXTRA: dict[str, dict[str, type[Any]]] = {
    "models": {
        "architectures": list, "model_types": list, "checkpoints": str, "template": str, "loads": bool, "generic": bool,
        "source": str, "parts": dict, "thinking": dict, "traps": list, "grounding": dict,
    },
    "templates": {"from_model": list},
    "trainers": {"template": str, "task": str, "rows": str, "engine": bool},
    "engines": {"takes": str},
    "datasets": {"generic": bool},
    "parts": {"kind": str},
}  # fmt: skip
_FAMILY = {"architectures", "model_types", "checkpoints", "source"}  # of models: with one of these it is data, without hooks
_GROUPS = (*(kind for kind in KINDS if kind != "commands"), "plugins", "plugin", "config")  # of commands, in swift_core.cli
_COMMAND: dict[str, type[Any]] = {"name": str, "help": str, "target": str}
_TOP: dict[str, type[Any]] = {"name": str, "api": str, "summary": str, "hooks": str, "requires": list}


class ManifestError(ValueError):
    """The manifest is wrong; the message names the table, the key and what was expected."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One contribution of a manifest. `options` holds the keys particular to its kind."""

    kind: str  # the table: "tuners"
    id: str
    summary: str = ""
    requires: tuple[str, ...] = ()
    config: str | None = None  # "module:Class" of the options' dataclass
    capabilities: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def singular(self) -> str:
        return KINDS[self.kind]


@dataclass(frozen=True, slots=True)
class Manifest:
    name: str
    api: tuple[int, int]
    summary: str
    hooks: str | None
    requires: tuple[str, ...]
    entries: tuple[Entry, ...]
    path: Path


def read_manifest(path: Path) -> Manifest:
    """Parse and check a manifest. Raises ManifestError with one line."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ManifestError(f"its manifest {path.name} is missing from {path.parent}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise ManifestError(f"{path.name} is not valid TOML: {err}") from None
    tables = {key: value for key, value in data.items() if isinstance(value, list) and key not in _TOP}
    top = {key: value for key, value in data.items() if key not in tables}
    _check_keys("the manifest", top, _TOP, required=("name", "api", "summary"))
    try:
        api = parse_api(top["api"])
    except ValueError as err:
        raise ManifestError(str(err)) from None
    entries = [_read_entry(kind, entry) for kind, table in tables.items() for entry in table]
    if not all(map(_is_data, entries)) and "hooks" not in top:
        raise ManifestError("hooks is missing: the dotted name of the module that answers for these ids")
    seen: set[tuple[str, str]] = set()
    for entry in entries:
        if (entry.kind, entry.id) in seen:
            raise ManifestError(f"[[{entry.kind}]] names {entry.id!r} twice")
        seen.add((entry.kind, entry.id))
    requires = tuple(top.get("requires", ()))
    return Manifest(top["name"], api, top["summary"], top.get("hooks"), requires, tuple(entries), path)


def _is_data(entry: Entry) -> bool:
    """Whether no hook answers for an entry: a command, or a family that another plugin's loader loads."""
    loads = entry.options.get("loads") or entry.options.get("generic")
    return entry.kind == "commands" or (entry.kind == "models" and not loads and bool(_FAMILY & entry.options.keys()))


def _read_entry(kind: str, entry: Any) -> Entry:
    if kind not in KINDS:
        raise ManifestError(f"unknown table [[{kind}]].{did_you_mean(kind, KINDS)}")
    if not isinstance(entry, dict):
        raise ManifestError(f"[[{kind}]] must be a table")
    if kind == "commands":
        _check_keys("[[commands]]", entry, _COMMAND, required=("name", "help", "target"))
        if " " in entry["name"] and not re.fullmatch(rf"({'|'.join(_GROUPS)}) \S+", entry["name"]):
            raise ManifestError(f"[[commands]] {entry['name']!r} must be one word, or one after a group: {', '.join(_GROUPS)}")
        return Entry(kind, entry["name"], entry["help"], options={"target": entry["target"]})
    extra = _EXTRA.get(kind, {})
    _check_keys(f"[[{kind}]]", entry, {**_COMMON, **extra}, required=("id", "kind") if kind == "parts" else ("id",))
    for key in ("config", "source"):
        if key in entry and ":" not in entry[key]:
            raise ManifestError(f"[[{kind}]] {entry['id']}: {key} must read module:name, not {entry[key]!r}")
    if kind == "parts" and entry["kind"] not in PART_KINDS:
        raise ManifestError(f"[[parts]] {entry['id']}: kind must be one of {', '.join(PART_KINDS)}")
    ident = f"{entry['kind']}/{entry['id']}" if kind == "parts" else entry["id"]
    return Entry(
        kind, ident, entry.get("summary", ""), tuple(entry.get("requires", ())), entry.get("config"),
        tuple(entry.get("capabilities", ())), {key: entry[key] for key in extra if key in entry},
    )  # fmt: skip


def _check_keys(where: str, found: dict[str, Any], known: dict[str, type[Any]], required: tuple[str, ...]) -> None:
    for key, value in found.items():
        if key not in known:
            raise ManifestError(f"{where}: unknown key {key!r}.{did_you_mean(key, known)}")
        if not isinstance(value, known[key]):
            raise ManifestError(f"{where}: {key} must be a {known[key].__name__}, not {type(value).__name__}")
    for key in required:
        if key not in found:
            raise ManifestError(f"{where}: {key} is missing")
