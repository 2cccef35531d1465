"""Advantages: by how much an answer's reward is better than what it is compared with.

Shapes: P prompts, G answers to each, R rewards. A reward that is NaN was not given: it is left out of means and spreads, and
its answer's advantage is 0.
"""

from __future__ import annotations

import torch

EPSILON = 1e-4  # added to a spread that is divided by


def advantages(
    kind: str, scores: torch.Tensor, parts: torch.Tensor, weights: torch.Tensor, whiten: bool = False
) -> torch.Tensor:
    """The advantage of each answer: [P, G]. scores: [P, G], the weighted sums. parts: [P, G, R] and weights: [R], for gdpo.

    group: (r - mean) / spread of the prompt's answers (GRPO, arXiv 2402.03300). none: without the spread. batch: over the
    spread of all. rloo: r - mean of the prompt's other answers (arXiv 2402.14740). reinforce_plus_plus: mean and spread of all
    (arXiv 2501.03262); its _baseline: r - mean of the prompt's, over the spread of those differences. gdpo: each reward
    normalised in its group, their weighted sum over the batch (arXiv 2601.05242). whiten: all to mean 0 and spread 1.
    """
    if kind == "gdpo":
        own = (parts - parts.nanmean(1, keepdim=True)) / (spread(parts, 1) + EPSILON)
        own = own.masked_fill(~has_signal(parts)[:, None] & ~parts.isnan(), 0.0)
        total = (own * weights).nansum(-1)
        total = total.masked_fill(parts.isnan().all(-1), torch.nan)
        found = (total - total.nanmean()) / (spread(total) + EPSILON)
        found = found.masked_fill(~has_signal(total.reshape(1, -1)), 0.0)
    elif kind == "reinforce_plus_plus":
        found = (scores - scores.nanmean()) / (spread(scores) + EPSILON)
        found = found.masked_fill(~has_signal(scores.reshape(1, -1)), 0.0)
    elif kind == "rloo":
        given = (~scores.isnan()).sum(1, keepdim=True)
        found = scores - (scores.nansum(1, keepdim=True) - scores) / (given - 1)
        found = found.masked_fill(~has_signal(scores)[:, None], 0.0)
    else:
        found = scores - scores.nanmean(1, keepdim=True)
        found = found.masked_fill(~has_signal(scores)[:, None], 0.0)
        if kind == "group":
            found = found / (spread(scores, 1) + EPSILON)
        elif kind == "batch":
            found = found / (spread(scores) + EPSILON)
        elif kind == "reinforce_plus_plus_baseline":
            found = found / (spread(found) + EPSILON)
    if whiten:
        found = (found - found.nanmean()) / (spread(found) + EPSILON)
    return found.nan_to_num(0.0, 0.0, 0.0)


def spread(values: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """The standard deviation, n - 1 in the denominator, without NaNs: over all values a scalar, else with `dim` kept. NaN where
    there are fewer than two."""
    if dim is None:
        values, dim = values.flatten(), 0
    count = (~values.isnan()).sum(dim, keepdim=True)
    squares = ((values - values.nanmean(dim, keepdim=True)) ** 2).nansum(dim, keepdim=True)
    return (squares / (count - 1)).sqrt().masked_fill(count < 2, torch.nan)


def has_signal(scores: torch.Tensor) -> torch.Tensor:
    """Whether the answers to a prompt differ in reward, so that something can be learned: [P, G, ...] -> [P, ...] bool.

    A mean of equal numbers may be another by a rounding, and an optimizer makes a whole step of it."""
    filled = scores.nan_to_num(torch.inf).amin(1), scores.nan_to_num(-torch.inf).amax(1)
    return filled[1] - filled[0] > 1e-8


def soft_overlong(lengths: torch.Tensor, most: int, margin: int) -> torch.Tensor:
    """DAPO's soft penalty of long answers (arXiv 2503.14476, equation 13): 0 up to most - margin tokens, -1 at most."""
    if not margin:
        return torch.zeros_like(lengths, dtype=torch.float32)
    return ((most - margin - lengths.float()) / margin).clamp(-1.0, 0.0)
