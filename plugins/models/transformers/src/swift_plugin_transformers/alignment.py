"""Loss weights of a text whose media placeholders a processor expanded into many tokens. Media tokens are never trained.

Where the processor tells what it replaced, characters of the expanded text map back to the text. Else the tokens of the
text are found again between the expansions; where that can be read in two ways that differ, the row is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

EDGE = 3  # tokens beside an expansion that may have merged with it, on each side

Replaced = tuple[int, int, int, int]  # characters [start, end) of the text, [start, end) of the expanded text


class Unaligned(ValueError):
    """The expanded tokens do not hold the text as it was tokenized."""


@dataclass(frozen=True)
class Expansion:
    """Tokens of an expanded text, and how many of them each medium takes."""

    ids: list[int]
    weights: list[float]
    counts: list[int]


def mapped_back(offsets: Sequence[tuple[int, int]], replaced: Sequence[Replaced]) -> tuple[list[tuple[int, int]], list[int]]:
    """Offsets in the text for tokens of the expanded text, (0, 0) for tokens of media; and the tokens of each medium.

    A token that lies across the border of an expansion is a token of it.
    """
    found, counts = [], [0] * len(replaced)
    at, shift = 0, 0  # expansions passed so far, and characters gained by them
    for begin, end in offsets:
        while at < len(replaced) and begin >= replaced[at][3]:
            shift = replaced[at][3] - replaced[at][1]
            at += 1
        if end <= begin:
            found.append((0, 0))
        elif at < len(replaced) and end > replaced[at][2]:
            counts[at] += 1
            found.append((0, 0))
        else:
            found.append((begin - shift, end - shift))
    return found, counts


def matched(ids: Sequence[int], weights: Sequence[float], media: Sequence[bool], expanded: Sequence[int]) -> Expansion:
    """Weights of `expanded`, which holds the tokens `ids` but for those marked in `media`, each group of which it expands.

    Blocks of tokens between expansions are placed as far left as they can be, then as far right. Both must give the same
    weights. A few untrained tokens beside an expansion may differ. Raises Unaligned.
    """
    blocks = _blocks(weights, media)
    lefts = _place(ids, weights, blocks, list(expanded))
    rights = _place_right(ids, lefts, list(expanded))
    left, right = (_spread(len(expanded), weights, placed) for placed in (lefts, rights))
    if left != right:
        raise Unaligned("it cannot be told which of the expanded tokens are the answer's")
    ends = [(at, at + last - first) for first, last, at in lefts]
    return Expansion(list(expanded), left, [after[0] - before[1] for before, after in pairwise(ends)])


Block = tuple[int, int]  # tokens [first, last) of the text
Placing = tuple[int, int, int]  # a block, and where the expanded tokens have it


def _blocks(weights: Sequence[float], media: Sequence[bool]) -> list[Block]:
    """Runs of tokens that are not media: before, between and after the groups of media tokens. The outer ones may be empty."""
    blocks, first = [], 0
    for n, inside in enumerate(media):
        if inside:
            if n == 0 or not media[n - 1]:
                blocks.append((first, n))
            first = n + 1
    return [*blocks, (first, len(weights))]


def _place(ids: Sequence[int], weights: Sequence[float], blocks: list[Block], expanded: list[int]) -> list[Placing]:
    """Each block as far left as it can stand, in order; the first at the start, the last at the end."""
    placed: list[Placing] = []
    low = 0
    for number, block in enumerate(blocks):
        for first, last in _trims(block, weights):
            wanted = list(ids[first:last])
            if number == len(blocks) - 1:
                ends = [at for at in _ends(expanded, wanted) if at >= low]
                at = min(ends, default=-1)
            elif number == 0:
                at = 0 if expanded[: len(wanted)] == wanted else -1
            else:
                at = find(expanded, wanted, low)
            if at >= 0:
                placed.append((first, last, at))
                low = at + len(wanted)
                break
        else:
            raise Unaligned("the processor changes the text around its media, so the mask cannot be placed")
    return placed


def _trims(block: Block, weights: Sequence[float]) -> list[Block]:
    """The block, then shorter ones without a few of its untrained tokens at the ends, least first."""
    first, last = block
    found = []
    for cut in range(EDGE + 1):
        for back in range(EDGE + 1):
            low, high = first + cut, last - back
            if low <= high and not any(weights[first:low]) and not any(weights[high:last]):
                found.append((cut + back, low, high))
    return [(low, high) for _, low, high in sorted(found)]


def _place_right(ids: Sequence[int], lefts: list[Placing], expanded: list[int]) -> list[Placing]:
    """The same blocks as far right as they can stand."""
    placed: list[Placing] = []
    high = len(expanded)
    for number in range(len(lefts) - 1, -1, -1):
        first, last, at = lefts[number]
        if number == len(lefts) - 1:
            at = max(_ends(expanded, list(ids[first:last])))
        elif number:
            at = find_last(expanded, list(ids[first:last]), high)
        placed.append((first, last, at))
        high = at
    return placed[::-1]


def _ends(expanded: list[int], wanted: list[int]) -> list[int]:
    """Where the last block may stand: at the end, or before a few tokens that the processor adds there."""
    places = [len(expanded) - len(wanted) - more for more in range(EDGE + 1)]
    return [at for at in places if at >= 0 and expanded[at : at + len(wanted)] == wanted]


def _spread(length: int, weights: Sequence[float], placed: list[Placing]) -> list[float]:
    spread = [0.0] * length
    for first, last, at in placed:
        spread[at : at + last - first] = weights[first:last]
    return spread


def find(tokens: list[int], wanted: list[int], low: int) -> int:
    """The first place of `wanted` from `low` on; -1 if there is none."""
    if not wanted:
        return low
    at = low
    while True:
        try:
            at = tokens.index(wanted[0], at, max(low, len(tokens) - len(wanted) + 1))
        except ValueError:
            return -1
        if tokens[at : at + len(wanted)] == wanted:
            return at
        at += 1


def find_last(tokens: list[int], wanted: list[int], high: int) -> int:
    """The last place of `wanted` that ends at `high` or before; -1 if there is none."""
    return next((at for at in range(high - len(wanted), -1, -1) if tokens[at : at + len(wanted)] == wanted), -1)
