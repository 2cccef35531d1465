"""The results of a run, one JSON object a line, as they come: a second call goes on where the first one stopped.

A row is known by its subject and by the versions of the libraries that it was made with.
"""

from __future__ import annotations

import json
import tomllib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Row = dict[str, Any]
LONGEST = 160  # characters of a reason
BESIDE = ("torchvision", "timm", "torchaudio")  # libraries that some architectures need, and most do without


def versions() -> dict[str, str]:
    """Of the two libraries that every result depends on, and of those that are installed beside them."""
    found = {"transformers": version("transformers"), "swift_core": version("swift-core")}
    for name in BESIDE:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


class Results:
    """`results.jsonl` in the output folder."""

    def __init__(self, folder: Path, resume: bool = True) -> None:
        self.file, self.versions = folder / "results.jsonl", versions()
        folder.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, Row] = {}
        if resume and self.file.is_file():
            lines = self.file.read_text(encoding="utf-8").splitlines()
            rows = [row for row in map(_parse, lines) if row]
            self.rows = {key_of(row): row for row in rows if self.versions.items() <= row.items()}
        self._rewrite()

    def add(self, row: Row) -> Row:
        """Write a row at once, so that a kill loses none."""
        row = {**row, **self.versions}
        self.rows[key_of(row)] = row
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return row

    def _rewrite(self) -> None:
        pending = self.file.with_suffix(".tmp")
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows.values())
        pending.write_text(text, encoding="utf-8")
        pending.replace(self.file)


def key_of(row: Row) -> str:
    return f"{row['kind']}/{row['model_type']}/{row['name']}"


def passes(row: Row) -> bool:
    """Whether every check passed or does not apply."""
    return all(check["state"] in ("pass", "n/a") for check in row["checks"].values())


@cache
def causes() -> dict[str, dict[str, Any]]:
    """By model type, what is known to be behind failed `checks`: its `cause`."""
    return tomllib.loads((Path(__file__).parent / "causes.toml").read_text(encoding="utf-8"))


def reasons(row: Row) -> list[str]:
    """`checks: reason` of those that failed; what is behind several is said once. The results keep what each of them said."""
    known = causes().get(row["model_type"], {})
    told: dict[str, list[str]] = {}
    for name, check in row["checks"].items():
        if check["state"] == "fail":
            text = known["cause"] if name in known.get("checks", ()) else check["note"]
            told.setdefault(text if len(text) <= LONGEST else f"{text[:LONGEST]} ...", []).append(name)
    return [f"{', '.join(names)}: {text}" for text, names in told.items()]


def _parse(line: str) -> Row | None:
    """A line of the file; None of a last one that a kill cut short."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "checks" in row else None
