"""Figures of an evaluation, from what was predicted and what was right. Pure functions of plain lists."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def classes(predicted: Sequence[int], right: Sequence[int]) -> dict[str, float]:
    """Accuracy, and the mean over classes of F1."""
    hits = sum(a == b for a, b in zip(predicted, right, strict=True))
    return {"accuracy": hits / max(1, len(right)), "macro_f1": macro_f1([{p} for p in predicted], [{r} for r in right])}


def class_sets(predicted: Sequence[Sequence[int]], right: Sequence[Sequence[int]]) -> dict[str, float]:
    """The share of rows whose classes are all right, and the mean over classes of F1."""
    sets = [set(p) for p in predicted], [set(r) for r in right]
    hits = sum(a == b for a, b in zip(*sets, strict=True))
    return {"accuracy": hits / max(1, len(right)), "macro_f1": macro_f1(*sets)}


def macro_f1(predicted: Sequence[set[int]], right: Sequence[set[int]]) -> float:
    """The mean of F1 over the classes that occur, right or predicted."""
    scores = []
    for label in sorted(set().union(*predicted, *right)):
        both = sum(label in p and label in r for p, r in zip(predicted, right, strict=True))
        either = sum((label in p) + (label in r) for p, r in zip(predicted, right, strict=True))
        scores.append(2 * both / either)
    return sum(scores) / max(1, len(scores))


def numbers(predicted: Sequence[Sequence[float]], right: Sequence[Sequence[float]]) -> dict[str, float]:
    """Mean squared error, and Pearson's correlation over all numbers (0 where either side does not vary)."""
    p, r = ([item for row in side for item in row] for side in (predicted, right))
    error = sum((a - b) ** 2 for a, b in zip(p, r, strict=True)) / max(1, len(r))
    return {"mse": error, "pearson": pearson(p, r)}


def pearson(one: Sequence[float], other: Sequence[float]) -> float:
    n = max(1, len(one))
    middle = sum(one) / n, sum(other) / n
    spread = [math.sqrt(sum((x - m) ** 2 for x in side)) for side, m in zip((one, other), middle, strict=True)]
    if not spread[0] * spread[1]:
        return 0.0
    return sum((a - middle[0]) * (b - middle[1]) for a, b in zip(one, other, strict=True)) / (spread[0] * spread[1])


def tags(predicted: Sequence[Sequence[int]], right: Sequence[Sequence[int]], outside: int = 0) -> dict[str, float]:
    """Token accuracy, and F1 over the tokens that are, or are taken to be, of a class other than `outside`."""
    pairs = [(a, b) for p, r in zip(predicted, right, strict=True) for a, b in zip(p, r, strict=True)]
    both = sum(a == b != outside for a, b in pairs)
    either = sum((a != outside) + (b != outside) for a, b in pairs)
    hits = sum(a == b for a, b in pairs) / max(1, len(pairs))
    return {"accuracy": hits, "token_f1": 2 * both / either if either else 1.0}


def ranks(found: Sequence[int]) -> dict[str, float]:
    """From the rank of each query's own document (1 is first): the share of firsts, and the mean of 1 / rank."""
    n = max(1, len(found))
    return {"accuracy": sum(rank == 1 for rank in found) / n, "mrr": sum(1 / rank for rank in found) / n}


def pairs(better: Sequence[float], worse: Sequence[float]) -> dict[str, float]:
    """The share of pairs that the scores put in order, and how far apart they are."""
    n = max(1, len(better))
    hits = sum(a > b for a, b in zip(better, worse, strict=True))
    return {"accuracy": hits / n, "margin": sum(a - b for a, b in zip(better, worse, strict=True)) / n}


def steps(predicted: Sequence[Sequence[int]], right: Sequence[Sequence[int]]) -> dict[str, float]:
    """The share of steps that are judged rightly, and of rows of which all are."""
    pairs = [(a, b) for p, r in zip(predicted, right, strict=True) for a, b in zip(p, r, strict=True)]
    whole = sum(list(p) == list(r) for p, r in zip(predicted, right, strict=True))
    return {"accuracy": sum(a == b for a, b in pairs) / max(1, len(pairs)), "row_accuracy": whole / max(1, len(right))}


def figures(kind: str, seen: list[tuple[Any, Any]]) -> dict[str, float]:
    """The figures of a kind of prediction; `seen` are pairs of predicted and right."""
    if not seen:
        return {}
    predicted, right = [p for p, _ in seen], [r for _, r in seen]
    if kind == "rank":
        return ranks(predicted)
    if kind == "alike":
        return {"pearson": pearson(predicted, right)}
    table = {
        "single_label": classes, "multi_label": class_sets, "regression": numbers, "tag": tags, "pair": pairs, "steps": steps,
    }  # fmt: skip
    return table[kind](predicted, right)
