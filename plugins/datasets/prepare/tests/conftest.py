"""Rows in a file, a template of bytes, and an empty user's cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from swift_core.cache import fingerprint
from swift_core.types import Record, Sample


@dataclass
class Rows:
    """A `RawDataset` of a text file: each line a question and an answer with a tab between."""

    path: Path

    def __iter__(self) -> Iterator[Record]:
        return map(self.record, self.raw())

    def raw(self) -> Iterator[Any]:
        with self.path.open("rb") as file:
            yield from enumerate(file, 1)

    def record(self, raw: tuple[int, bytes]) -> Record:
        question, tab, answer = raw[1].decode().rstrip("\n").partition("\t")
        where = f"{self.path.name}:{raw[0]}"
        return Record({"q": question, "a": answer}, where) if tab else Record({}, where, "no tab")

    def fingerprint(self) -> str:
        return fingerprint([self.path])


class Bytes:
    """A template: one token a byte, and 0 to end the answer. `log` gets a line for each row, from whatever process."""

    def __init__(self, log: Path | None = None) -> None:
        self.log = log

    def encode(self, row: dict[str, Any]) -> list[Sample]:
        if self.log:
            with self.log.open("a") as file:
                file.write(row["q"] + "\n")
        ids = [*row["q"].encode(), *row["a"].encode(), 0]
        weights = [0.0] * len(row["q"].encode()) + [1.0] * (len(row["a"].encode()) + 1)
        return [Sample(ids, weights, turns=[1])]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty user's cache; returns the folder that prepared data goes to."""
    monkeypatch.setenv("SWIFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


@pytest.fixture
def rows(tmp_path: Path, cache: Path) -> Callable[..., Rows]:
    """`rows(300)` writes a data set of 300 rows of different lengths; `bad` are numbers of lines that are refused."""

    def make(count: int, name: str = "rows.txt", bad: tuple[int, ...] = ()) -> Rows:
        lines = ["broken" if n in bad else f"q{n}\t{'a' * (n % 7)}{n}" for n in range(1, count + 1)]
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return Rows(tmp_path / name)

    return make


@pytest.fixture
def template() -> Bytes:
    return Bytes()
