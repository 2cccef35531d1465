"""Which rows are read, and in which order: the hold-out, weights, several streams as one. Chosen by number, before anything
is encoded.
"""

from __future__ import annotations

import random
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import compress, groupby, islice
from typing import Any

from swift_core.errors import RequestError
from swift_core.source import Source
from swift_core.types import Record


@dataclass
class Mixed(Source):
    """Several streams as one: the next row comes from the source that is furthest behind its weight."""

    parts: Sequence[Source] = ()

    def raws(self) -> Iterator[Any]:
        return islice(self._turns(), self.first, self.stop)

    def _turns(self) -> Iterator[Any]:
        live = {n: part.raws() for n, part in enumerate(self.parts)}
        taken = dict.fromkeys(live, 0)
        while live:
            n = min(live, key=lambda n: (taken[n] / self.parts[n].weight, n))
            taken[n] += 1
            try:
                yield n, next(live[n])
            except StopIteration:
                del live[n]

    def _parse(self, raw: tuple[int, Any]) -> Record:
        return self.parts[raw[0]].record(raw[1])


def one_source(sources: Sequence[Source]) -> Source:
    """The source that a stream reads."""
    return sources[0] if len(sources) == 1 else Mixed("stream", (), parts=sources)


def hold_out(total: int, holdout: float, seed: int) -> bytes:
    """A flag for each of `total` rows: 1 for those kept back, a share (below 1) or a count of them, at random by the seed."""
    count = int(holdout) if holdout >= 1 else max(1, round(holdout * total))
    if count >= total:
        raise RequestError(f"holdout: {count} rows kept back of {total} leave none to train on")
    flags = bytearray(total)
    for n in random.Random(seed).sample(range(total), count):
        flags[n] = 1
    return bytes(flags)


Span = tuple[float, int, int]
"""A source's weight, its first row and its end."""


def order(row_of: Sequence[int], spans: Sequence[Span], held: bytes, seed: int) -> tuple[array[int], int]:
    """The samples of an epoch, and its number of rows. row_of: the row of each sample, ascending.

    Each row stands `weight` times, source by source; of a fraction of a weight that share of the source, at random.
    """
    found, rows = array("I"), 0
    for weight, group in groupby(spans, key=lambda span: span[0]):
        parts = list(group)
        start, stop = parts[0][1], parts[-1][2]
        flags = bytes(1 - flag for flag in held[start:stop]) if held else b"\1" * (stop - start)
        places = range(bisect_left(row_of, start), bisect_left(row_of, stop))
        kept = array("I", compress(places, (flags[row - start] for row in row_of[places.start : places.stop])))
        count = sum(flags)
        extra = round((weight - int(weight)) * count)
        found.extend(kept * int(weight))
        rows += count * int(weight) + extra
        if extra:
            numbers = array("Q", compress(range(start, stop), flags))
            for n in sorted(random.Random(seed).sample(range(count), extra)):
                place = bisect_left(row_of, numbers[n])
                while place < len(row_of) and row_of[place] == numbers[n]:
                    found.append(place)
                    place += 1
    return found, rows
