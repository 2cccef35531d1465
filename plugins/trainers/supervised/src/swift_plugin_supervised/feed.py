"""Which samples a step takes: rows to packs, packs to forward passes, passes to steps and ranks.

All of it is a pure function of the samples' lengths, the options, the seed and the step, so a resumed run asks again and
gets the same answers. A stream is read window by window, each treated as an epoch is; a checkpoint keeps where it begins.
"""

from __future__ import annotations

import math
import random
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

from swift_core.errors import RequestError
from swift_core.types import Sample


class Groups(Sequence[Sequence[int]]):
    """Groups of sample indexes, held in two arrays: a million samples take 8 MB."""

    def __init__(self, groups: Iterator[Sequence[int]]) -> None:
        self.members, self.ends = array("I"), array("I", [0])
        for group in groups:
            self.members.extend(group)
            self.ends.append(len(self.members))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self.members[self.ends[number] : self.ends[number + 1]]


class Feed:
    """The forward passes of each step over finite samples or a stream.

    A row is a sample, or with `packing` a pack of several; a pass takes `batch_size` rows, or with `batch_tokens` as many
    rows of like length as that many tokens hold; a step takes `accumulate` passes of each of `world` ranks.
    """

    def __init__(self, data: Any, config: Any, flat: bool, world: int, seed: int) -> None:
        self.data, self.config, self.flat, self.world, self.seed = data, config, flat, world, seed
        self.streams = hasattr(data, "window")
        self.barren = 0  # how often in a row the stream ended without a sample
        self.position, self.first = 0, 0  # of the window: its first record, and the step before its first one
        if self.streams:
            self._open(0, 0)
        else:
            self._take(data)

    @property
    def epoch_steps(self) -> int:
        """Steps of one pass over the samples, or over the window."""
        return math.ceil(len(self.rows) / self.rows_a_step)

    def seek(self, position: int, first: int) -> None:
        """Go on in the window that began at record `position` after step `first`."""
        if self.streams:
            self._open(position, first)

    def passes(self, step: int, rank: int) -> list[list[Sample]]:
        """The samples of each forward pass that this rank makes in step `step` (1-based)."""
        while self.streams and step > self.first + self.epoch_steps:
            self._open(self.next, self.first + self.epoch_steps)
        epoch, within = divmod(step - 1 - self.first, self.epoch_steps)
        order = self._order(self.first if self.streams else epoch)
        rows = share_of_rank(order[within * self.rows_a_step : (within + 1) * self.rows_a_step], rank, self.world)
        return [
            [self.samples[n] for row in rows[at : at + self.rows_a_pass] for n in self.rows[row]]
            for at in range(0, len(rows), self.rows_a_pass)
        ]

    def _open(self, position: int, first: int) -> None:
        samples, self.next = self.data.window(position)
        self.position, self.first = position, first
        self.barren = 0 if len(samples) else self.barren + (self.next == 0)
        if self.barren > 1:  # from its beginning to its end
            raise RequestError("dataset: no row of the stream can be trained on; data/issues.jsonl gives the reasons")
        self._take(samples)

    def _take(self, samples: Any) -> None:
        config, self.samples, self._shuffled = self.config, samples, (-1, array("I"))
        self.rows: Sequence[Sequence[int]] = Single(len(samples))
        self.rows_a_pass = config.batch_size
        if config.packing:
            self.rows = Groups(best_fit(samples.lengths, config.max_length))
        if config.batch_tokens is not None:
            sizes = [sum(samples.lengths[n] for n in row) for row in self.rows]
            order = list(range(len(sizes)))
            random.Random(f"{self.seed}-passes").shuffle(order)
            filled = by_tokens(order, sizes, config.batch_tokens, padded=not self.flat)
            self.rows = Groups([n for row in group for n in self.rows[row]] for group in filled)
            self.rows_a_pass = 1
        self.rows_a_step = self.rows_a_pass * config.accumulate * self.world

    def _order(self, epoch: int) -> Sequence[int]:
        if not self.config.shuffle:
            return range(len(self.rows))
        if self._shuffled[0] != epoch:
            order = array("I", range(len(self.rows)))
            random.Random(f"{self.seed}-{epoch}").shuffle(order)
            self._shuffled = epoch, order
        return self._shuffled[1]


class Single(Sequence[Sequence[int]]):
    """Every sample a row of its own."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < self.count:
            raise IndexError(number)
        return (number,)


def best_fit(lengths: Sequence[int], capacity: int) -> Iterator[list[int]]:
    """Packs of at most `capacity` tokens by best-fit-decreasing: each sample, longest first, goes where least room is left.

    Takes O(n log n) in samples: an integer's bits say which amounts of room there are. A sample longer than `capacity` is
    alone.
    """
    packs: list[list[int]] = []
    room: dict[int, list[int]] = {}  # tokens left -> packs
    amounts = 0  # bit r is set when room[r] holds a pack
    for n in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length = lengths[n]
        fitting = amounts >> length
        if fitting:
            left = length + (fitting & -fitting).bit_length() - 1
            pack = room[left].pop()
            if not room[left]:
                amounts &= ~(1 << left)
            packs[pack].append(n)
        else:
            left, pack = max(capacity, length), len(packs)
            packs.append([n])
        left -= length
        room.setdefault(left, []).append(pack)
        amounts |= 1 << left
    return iter(packs)


def by_tokens(order: list[int], sizes: Sequence[int], budget: int, padded: bool, bucket: int = 2048) -> Iterator[list[int]]:
    """Groups of rows with at most `budget` tokens together, padding to the longest included where `padded`.

    Rows are grouped by like length within buckets of `bucket` rows in the given order. A row above the budget is alone.
    """
    for at in range(0, len(order), bucket):
        group: list[int] = []
        for row in sorted(order[at : at + bucket], key=sizes.__getitem__):  # so the newest is the longest
            tokens = sizes[row] * (len(group) + 1) if padded else sizes[row] + sum(sizes[n] for n in group)
            if group and tokens > budget:
                yield group
                group = []
            group.append(row)
        if group:
            yield group


def cut(samples: list[Sample], limit: int | None) -> list[list[Sample]]:
    """The samples in their order, in parts of at most `limit` tokens. A longer sample is alone."""
    if limit is None:
        return [samples]
    parts: list[list[Sample]] = []
    room = 0
    for sample in samples:
        length = len(sample.input_ids)
        if not parts or length > room:
            parts.append([])
            room = limit
        parts[-1].append(sample)
        room -= length
    return parts


def ahead(
    make: Callable[[Any], Any], items: Iterable[Any], depth: int, release: Callable[[], None] = lambda: None
) -> Iterator[Any]:
    """`make` of each item in order, by a thread that is up to `depth` items ahead and calls `release` after each; without one
    where `depth` is 0."""
    if not depth:
        yield from map(make, items)
        return
    items, waiting = iter(items), deque[Future[Any]]()

    def work(item: Any) -> Any:
        try:
            return make(item)
        finally:
            release()

    with ThreadPoolExecutor(1, "ahead") as thread:
        try:
            waiting.extend(thread.submit(work, item) for item in islice(items, depth))
            while waiting:
                made = waiting.popleft().result()
                waiting.extend(thread.submit(work, item) for item in islice(items, 1))
                yield made
        finally:
            for future in waiting:
                future.cancel()


def share_of_rank(rows: Sequence[int], rank: int, world: int) -> Sequence[int]:
    """A contiguous share for each rank, sizes differing by one at most."""
    return rows[rank * len(rows) // world : (rank + 1) * len(rows) // world]
