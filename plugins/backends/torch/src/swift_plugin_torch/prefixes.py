"""States of prompts that were computed before, by adapter and tokens, for prompts that begin alike.

Bounded in bytes; the one used longest ago goes first. States of other weights are never used: `clear` forgets all.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from swift_plugin_torch.slots import States

LEAST = 64  # tokens that must be alike: what fewer would save is not worth their copy


@dataclass(eq=False)
class Entry:
    adapter: str | None
    ids: np.ndarray  # type: ignore[type-arg]
    states: States
    bytes: int


class Prefixes:
    """What is kept, the one used last at the end."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0  # in bytes
        self._entries: OrderedDict[int, Entry] = OrderedDict()

    def find(self, adapter: str | None, ids: Sequence[int]) -> tuple[States | None, int]:
        """States that begin with most of `ids`, and how many tokens of them count: all but the last at most."""
        best, count = None, 0
        own = np.asarray(ids)
        for key, entry in self._entries.items():
            if entry.adapter == adapter and (alike := _alike(entry.ids, own[:-1])) > count:
                best, count = key, alike
        if best is None or count < LEAST:
            return None, 0
        self._entries.move_to_end(best)
        return self._entries[best].states, count

    def lacks(self, adapter: str | None, ids: Sequence[int]) -> bool:
        """Whether keeping states of `ids` is of use: there is room for them, and none that begin with them."""
        if not self.limit or len(ids) < LEAST:
            return False
        own = np.asarray(ids)
        return not any(entry.adapter == adapter and _alike(entry.ids, own) == len(own) for entry in self._entries.values())

    def keep(self, adapter: str | None, ids: Sequence[int], states: States) -> None:
        """Keep states, in place of those of a beginning of `ids`."""
        own = np.asarray(ids)
        size = sum(keys.nbytes + values.nbytes for keys, values in states)
        if size > self.limit:
            return
        for key, entry in list(self._entries.items()):
            if entry.adapter == adapter and _alike(entry.ids, own) == len(entry.ids):
                self._drop(key)
        entry = Entry(adapter, own, states, size)
        self._entries[id(entry)] = entry
        self.bytes += size
        while self.bytes > self.limit:
            self._drop(next(iter(self._entries)))

    def forget(self, adapter: str) -> None:
        """Drop what was computed with an adapter."""
        for key in [key for key, entry in self._entries.items() if entry.adapter == adapter]:
            self._drop(key)

    def clear(self) -> None:
        self._entries.clear()
        self.bytes = 0

    def _drop(self, key: int) -> None:
        self.bytes -= self._entries.pop(key).bytes


def _alike(one: np.ndarray, other: np.ndarray) -> int:  # type: ignore[type-arg]
    """How many elements two arrays begin with alike."""
    count = min(len(one), len(other))
    differ = np.flatnonzero(one[:count] != other[:count])
    return int(differ[0]) if len(differ) else count
