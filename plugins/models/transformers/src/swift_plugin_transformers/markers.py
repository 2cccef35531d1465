"""Markers: the short bracketed words that a chat template writes around messages, and where two renderings part ways.

A marker need not be a special token of the tokenizer in use, so it is known by its shape: `<...>`, `[INST]`, `[|user|]`,
`]~b]`. Special tokens of other shapes are taken from the tokenizer. No position may ever lie inside a marker.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

SHAPES = (
    r"<[^<>\s]{1,64}>",
    r"\[/?[A-Z][A-Z0-9_]{1,31}\]",
    r"\[\|[^\[\]|\s]{1,32}\|\]",
    r"[\[\]][!~a-z]{0,3}~[!~a-z]{0,3}[\[\]]",
)
LONGEST = 72  # characters of a marker, at most
FILLER = {"begin", "start", "end", "of", "open", "close", "is"}  # words that tell an opening marker from its closing one


class Markers:
    """Finds markers in text."""

    def __init__(self, special: Iterable[str] = ()) -> None:
        shapes = re.compile("|".join(SHAPES))
        odd = {
            token for token in special if 1 < len(token) <= LONGEST and token.strip() == token and not shapes.fullmatch(token)
        }
        self.pattern = re.compile("|".join([*map(re.escape, sorted(odd, key=len, reverse=True)), *SHAPES]))

    def all(self, text: str, start: int = 0, end: int | None = None) -> list[str]:
        return [found.group() for found in self.pattern.finditer(text, start, len(text) if end is None else end)]

    def first(self, text: str, start: int = 0) -> str | None:
        found = self.pattern.search(text, start)
        return found.group() if found else None

    def shared(self, text: str, other: str) -> int:
        """Length of the common prefix, moved back to the start of a marker that it would cut in either."""
        length = common_prefix(text, other)
        moved = length
        for whole in (text, other):
            for found in self.pattern.finditer(whole, max(0, length - LONGEST), length + LONGEST):
                if found.start() < length < found.end():
                    moved = min(moved, found.start())
        return moved

    def closes(self, marker: str, earlier: Iterable[str]) -> bool:
        """Whether a marker closes an earlier one, as `</tool_call>` does `<tool_call>`: it ends a part, not the turn."""
        core = _core(marker)
        return bool(core) and any(_core(other) == core and other != marker for other in earlier)


def _core(marker: str) -> tuple[str, ...]:
    return tuple(word for word in re.findall(r"[^\W_▁]+", marker.lower()) if word not in FILLER)


def common_prefix(text: str, other: str) -> int:
    """Length of the common prefix, by halving: slices compare much faster than characters in a loop."""
    low, high = 0, min(len(text), len(other))
    if text[:high] == other[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if text[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def common_suffix(text: str, other: str) -> int:
    return common_prefix(text[::-1], other[::-1])


def place(text: str, other: str) -> int:
    """Where the end of `text` stands in `other`, which may render what comes before it differently; -1 if nowhere."""
    for length in range(min(len(text), 256), 0, -1):
        found = other.rfind(text[-length:])
        if found >= 0:
            return found + length
    return -1
