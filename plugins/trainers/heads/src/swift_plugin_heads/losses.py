"""The losses of models with a head: each the sum over a batch, which `Batch.weight` makes a mean.

Shapes: B samples, N texts of them, T tokens, C classes, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

IGNORED = -100


def classification(logits: torch.Tensor, values: Sequence[Any]) -> torch.Tensor:
    """logits [B, C]; a value is a class, a list of classes, or C numbers. Cross-entropy, the mean over classes of binary
    cross-entropies, or of squared errors. Raises ValueError for a label that the head has no place for."""
    kind = problem(values)
    logits = logits.float()
    if kind == "regression":
        target = torch.tensor(values, dtype=torch.float32, device=logits.device)
        if target.shape != logits.shape:
            raise ValueError(
                f"labels are {target.shape[-1]} numbers, and the model gives {logits.shape[-1]}; set model.problem=regression "
                f"model.num_labels={target.shape[-1]}"
            )
        return functional.mse_loss(logits, target, reduction="none").mean(1).sum()
    highest = max((max(value, default=0) if kind == "multi_label" else value for value in values), default=0)
    if highest >= logits.shape[-1]:
        raise ValueError(f"label {highest}: the model has {logits.shape[-1]} classes; set model.num_labels or model.labels")
    if kind == "multi_label":
        target = many_hot(values, logits.shape[-1]).to(logits.device)
        return functional.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1).sum()
    return functional.cross_entropy(logits, torch.tensor(values, device=logits.device), reduction="sum")


def problem(values: Sequence[Any]) -> str:
    """What prepared labels are: a number each is one class, a list of whole numbers several, of floats regression. Raises
    ValueError where they are not all of one kind."""
    lists = {isinstance(value, list) for value in values}
    if len(lists) > 1:
        raise ValueError("some labels are one class, and some are several or numbers; set model.problem to what is meant")
    if lists == {False}:
        return "single_label"
    return "regression" if any(isinstance(item, float) for value in values for item in value) else "multi_label"


def many_hot(values: Sequence[Sequence[int]], classes: int) -> torch.Tensor:
    """[B, C] with 1 for each class of a sample."""
    target = torch.zeros(len(values), classes)
    for row, value in enumerate(values):
        target[row, list(value)] = 1.0
    return target


def tagging(logits: torch.Tensor, values: Sequence[Sequence[int]]) -> torch.Tensor:
    """Cross-entropy of the labelled tokens; logits [B, T, C], values of up to T classes or -100 each."""
    target = torch.full(logits.shape[:2], IGNORED)
    for row, value in enumerate(values):
        target[row, : len(value)] = torch.tensor(value)
    if int(target.max()) >= logits.shape[-1]:
        raise ValueError(f"label {int(target.max())}: the model has {logits.shape[-1]} classes; set model.num_labels")
    return functional.cross_entropy(
        logits.float().flatten(0, 1), target.flatten().to(logits.device), ignore_index=IGNORED, reduction="sum"
    )


def infonce(
    queries: torch.Tensor, documents: torch.Tensor, own: torch.Tensor, temperature: float, allowed: torch.Tensor
) -> torch.Tensor:
    """-log of the share of each query's own document, sum over queries (van den Oord et al. 2018, equation 4).

    queries [B, H] and documents [D, H] of length 1; own [B]: the place of each query's document; allowed [B, D] bool: the
    documents that it is compared with, its own among them.
    """
    scores = (queries @ documents.t() / temperature).masked_fill(~allowed, float("-inf"))
    return functional.cross_entropy(scores, own, reduction="sum")


def cosent(cosines: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
    """B log(1 + sum over pairs i, j with label i above label j of exp((cos j - cos i) / temperature)); cosines, labels [B]."""
    scaled = cosines / temperature
    differences = (scaled[None, :] - scaled[:, None])[labels[:, None] > labels[None, :]]
    return torch.logsumexp(torch.cat([differences.new_zeros(1), differences]), 0) * len(cosines)


def ranking(scores: torch.Tensor, lengths: Sequence[int], values: Sequence[float | None]) -> torch.Tensor:
    """scores [N] of the documents of B queries, `lengths` of each. Where a query has a value it is one document's label
    (binary cross-entropy), else its first document is the best (softmax over its documents)."""
    total = scores.new_zeros((), dtype=torch.float32)
    for part, value in zip(scores.float().split(list(lengths)), values, strict=True):
        if value is None:
            total = total - torch.log_softmax(part, 0)[0]
        else:
            total = total + functional.binary_cross_entropy_with_logits(part, part.new_full(part.shape, value), reduction="sum")
    return total


def bradley_terry(scores: torch.Tensor, margins: Sequence[float], center: float | None = None) -> torch.Tensor:
    """-log sigmoid(better - worse - margin), sum over pairs (Bradley and Terry 1952; the margin: Touvron et al. 2023, Llama 2,
    arXiv 2307.09288, equation 2); scores [2 B], better before worse. center: plus center (better + worse)^2, which holds scores
    around 0 (Eisenstein et al. 2023, arXiv 2312.09244, section 2)."""
    better, worse = scores.float().view(-1, 2).unbind(1)
    loss = -functional.logsigmoid(better - worse - torch.tensor(margins, device=scores.device)).sum()
    return loss if center is None else loss + center * ((better + worse) ** 2).sum()
