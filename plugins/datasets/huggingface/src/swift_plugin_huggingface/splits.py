"""Splits and slices: `train`, `test[:100]`, `train[90%:]`, `[:10%]`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from swift_core.errors import RequestError, did_you_mean

T = TypeVar("T")

SPLIT = re.compile(r"(?P<name>[\w.-]+)?(?P<slice>\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


@dataclass(frozen=True)
class Split:
    """A split's name (None: not said) and the bounds of a slice: row numbers or percentages, as written."""

    name: str | None = None
    start: str | None = None
    stop: str | None = None

    @property
    def whole(self) -> bool:
        return self.start is None and self.stop is None


def parse_split(text: str | None) -> Split:
    """Raises ValueError saying what is expected."""
    match = SPLIT.fullmatch(text or "")
    if not match:
        raise ValueError(f"split: expected NAME or NAME[from:to], such as train, test[:100] or train[90%:], not {text!r}")
    return Split(match["name"], match["start"], match["stop"])


def cut(split: Split, rows: Callable[[], Iterator[T]]) -> Iterator[T]:
    """The rows of the slice. `rows` begins anew at each call; it is run twice where a bound counts from the end."""
    if split.whole:
        yield from rows()
        return
    counted = any(bound and ("%" in bound or "-" in bound) for bound in (split.start, split.stop))
    total = sum(1 for _ in rows()) if counted else None
    start = _absolute(split.start, total) if split.start else 0
    stop = _absolute(split.stop, total) if split.stop else None
    yield from islice(rows(), start, stop)


def _absolute(bound: str, total: int | None) -> int:
    """A bound as a row number. Percentages are rounded to the nearest row, as in the datasets library."""
    number = int(bound.rstrip("%"))
    if total is None:
        return number
    if bound.endswith("%"):
        number = round(number * total / 100)
    return min(max(number + total if number < 0 else number, 0), total)


def choose_split(found: Sequence[str], name: str | None, source: str) -> str:
    """One of the splits that a source has: the one named, else `train`, else the only one."""
    if name is not None and name in found:
        return name
    shown = ", ".join(found)
    if name is not None:
        raise RequestError(f"dataset {source!r} has no split {name!r}.{did_you_mean(name, found)} It has: {shown}.")
    if "train" in found or len(found) == 1:
        return "train" if "train" in found else found[0]
    raise RequestError(f"dataset {source!r} has several splits and no 'train': {shown}. Choose with dataset.split=NAME")
