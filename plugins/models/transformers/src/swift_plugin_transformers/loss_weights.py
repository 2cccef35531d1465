"""Loss weights: how much each character of a rendered row counts. One small function for each strategy.

`assistant` trains every answer, `last` the last one only, `all` everything, `spans` answers with weights by regular expression
(the loss scale of the SWIFT paper, section 3.2). A message's own `weight`, and `train: false`, which is weight 0, multiply.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import Any

from swift_core.errors import RequestError
from swift_core.types import Row

Piece = tuple[int, int, float]  # characters [start, end) and their weight; pieces are in order and do not overlap


def message_weight(message: Row) -> float:
    """What a message asks for: its `weight`, or 0 with `train: false`. Raises ValueError for a weight that is none."""
    weight = message.get("weight", 1.0)
    if message.get("train", True) is False:
        return 0.0
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
        raise ValueError(f"a message's weight is a number from 0 up, not {weight!r}")
    return float(weight)


def assistant(messages: Sequence[Row]) -> list[int]:
    """Every answer that is not left out."""
    return [n for n, message in enumerate(messages) if message["role"] == "assistant" and message_weight(message)]


def last(messages: Sequence[Row]) -> list[int]:
    """The last answer, unless it is left out itself."""
    answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    return [n for n in answers[-1:] if message_weight(messages[n])]


def every(messages: Sequence[Row]) -> list[int]:
    """Every message that is not left out; text between messages counts too."""
    return [n for n, message in enumerate(messages) if message_weight(message)]


STRATEGIES: dict[str, Callable[[Sequence[Row]], list[int]]] = {
    "assistant": assistant, "last": last, "all": every, "spans": assistant,
}  # fmt: skip


def compile_spans(spans: dict[str, Any]) -> list[tuple[re.Pattern[str], float]]:
    """The option `template.spans`. Raises RequestError for a bad pattern or weight."""
    found = []
    for pattern, weight in spans.items():
        try:
            found.append((re.compile(pattern, re.DOTALL), message_weight({"weight": weight})))
        except (re.error, ValueError) as err:
            raise RequestError(f"template.spans: {pattern!r}: {err}") from None
    return found


def by_regex(text: str, piece: Piece, spans: Sequence[tuple[re.Pattern[str], float]]) -> list[Piece]:
    """One piece cut at the matches of the patterns inside it, each with the weight of its pattern. Of several patterns that
    match a character, the later one wins. A pattern with groups weighs its groups, else its whole match."""
    start, end, weight = piece
    cuts: list[Piece] = [piece]
    for pattern, factor in spans:
        for found in pattern.finditer(text, start, end):
            groups = range(1, pattern.groups + 1) if pattern.groups else (0,)
            for group in groups:
                if found.start(group) < found.end(group):
                    cuts = overlay(cuts, (found.start(group), found.end(group), weight * factor))
    return cuts


def overlay(pieces: Sequence[Piece], top: Piece) -> list[Piece]:
    """`pieces` with `top` laid over them, inside what they cover."""
    found: list[Piece] = []
    for start, end, weight in pieces:
        low, high = max(start, top[0]), min(end, top[1])
        if low >= high:
            found.append((start, end, weight))
            continue
        found += [piece for piece in ((start, low, weight), (low, high, top[2]), (high, end, weight)) if piece[0] < piece[1]]
    return found


def trained_spans(pieces: Sequence[Piece]) -> list[tuple[int, int]]:
    """Characters with a weight; neighbours that `by_regex` cut are joined."""
    found: list[tuple[int, int]] = []
    for start, end, weight in pieces:
        if not weight:
            continue
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return found


def with_offsets(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a text without special tokens added, and where each begins and ends in it, by a fast tokenizer."""
    own = tokenizer.backend_tokenizer
    if own.truncation is None and own.padding is None:  # then this is all that the tokenizer's own call does
        encoded = own.encode(text, add_special_tokens=False)
        return encoded.ids, encoded.offsets
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(encoded["input_ids"]), encoded["offset_mapping"]


def token_weights(offsets: Sequence[tuple[int, int]], pieces: Sequence[Piece]) -> list[float]:
    """A weight for each token: that of the piece in which it begins. So a token across the start of a span is not trained,
    one across its end is; a token without characters is not."""
    begins = [begin for begin, _ in offsets]
    weights = [0.0] * len(begins)
    if begins != sorted(begins):  # normalised text: each token for itself
        starts = [piece[0] for piece in pieces]
        for token, begin in enumerate(begins):
            at = bisect_right(starts, begin) - 1
            weights[token] = pieces[at][2] if at >= 0 and begin < pieces[at][1] else 0.0
    else:
        for start, end, weight in pieces:
            first, last = bisect_left(begins, start), bisect_left(begins, end)
            weights[first:last] = [weight] * (last - first)
    return [weight if end > begin else 0.0 for weight, (begin, end) in zip(weights, offsets, strict=True)]
