"""Log-probabilities of answers from a forward pass: sums over their tokens, and what of a batch they are sums over.

Shapes: B rows, T tokens, N trained positions, S samples of the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from swift_core.types import Batch, Sample
from swift_plugin_supervised.groups import owners

from swift_plugin_preference.losses import kept

IMITATED = -1.0  # the weight of a token that is imitated only: it is no part of the answer


def answers(
    outputs: Any, batch: Batch, count: int, ld_alpha: float | None = None, logprobs: torch.Tensor | None = None
) -> torch.Tensor:
    """Of each of `count` samples the log-probability of its answer, a sum over tokens times their weights: [S].

    ld_alpha: factor of the tokens of a pair's answer beyond the length of the other one (see `losses.kept`). logprobs: those of
    the outputs, where they are known already.
    """
    logprobs = outputs.logprobs() if logprobs is None else logprobs
    weights, owner = batch.weights[:, 1:][outputs.trained].clamp(min=0), owners(outputs, batch)
    if ld_alpha is not None:
        lengths = torch.bincount(owner, minlength=count)
        place = torch.arange(len(owner), device=owner.device) - (lengths.cumsum(0) - lengths)[owner]
        logprobs = kept(logprobs, place, lengths.view(-1, 2).amin(1).repeat_interleave(2)[owner], ld_alpha)
    return logprobs.new_zeros(count).index_add(0, owner, logprobs * weights)


def imitation(outputs: Any, batch: Batch, count: int, logprobs: torch.Tensor) -> torch.Tensor:
    """Of each sample -log p of all trained tokens, those of its prompt included where they are: [S]."""
    weights = batch.weights[:, 1:][outputs.trained].abs()
    return logprobs.new_zeros(count).index_add(0, owners(outputs, batch), -logprobs * weights)


def weight_of(sample: Sample, whole: bool = False) -> float:
    """Tokens of an answer that are predicted, times their weights; `whole`: those of the prompt too, with a weight of 1."""
    return float(sum((weight or 1.0) if whole else weight for weight in sample.weights[1:]))


def imitate_prompts(batch: Batch) -> None:
    """Give the prompt of each pair's first sample the weight `IMITATED`. Where the pair holds its prompt once it is taken to be
    the first sample's, which it stands right before."""
    assert batch.sample_of is not None
    none = torch.iinfo(batch.sample_of.dtype).max
    following = batch.sample_of.masked_fill(batch.sample_of < 0, none).flip(1).cummin(1).values.flip(1)
    owner = following.masked_fill(following == none, -1)  # what is left is padding
    goes_on = torch.zeros_like(owner, dtype=torch.bool)
    goes_on[:, 1:] = owner[:, 1:] == owner[:, :-1]  # the token before it is of the same sample: it is predicted
    batch.sample_of = owner
    batch.weights = batch.weights.masked_fill(goes_on & (owner >= 0) & (owner % 2 == 0) & (batch.weights == 0), IMITATED)
