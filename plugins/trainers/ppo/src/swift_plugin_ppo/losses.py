"""PPO's clipped losses of tokens (arXiv 1707.06347, equation 7; the clipped value loss is that of OpenAI's baselines)."""

from __future__ import annotations

import torch


def policy_loss(
    logprobs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, low: float, high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A), and whether the clipped one counts: [N] -> [N], [N] bool."""
    ratio = (logprobs - old).exp()
    free, bound = -ratio * advantages, -ratio.clamp(1 - low, 1 + high) * advantages
    return torch.maximum(free, bound), (bound > free).detach()


def value_loss(
    values: torch.Tensor, old: torch.Tensor, returns: torch.Tensor, clip: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Half the squared error: the larger one of the value's own, and of the value held within `clip` of the old one; and
    whether the latter counts: [N] -> [N], [N] bool."""
    free = (values - returns) ** 2
    if clip is None:
        return 0.5 * free, torch.zeros_like(free, dtype=torch.bool)
    moved = values - old
    bound = (old + moved.clamp(-clip, clip) - returns) ** 2
    clipped = (bound > free) & (moved.abs() > clip)  # within the clip both are the same but for rounding
    return 0.5 * torch.maximum(free, bound), clipped.detach()
