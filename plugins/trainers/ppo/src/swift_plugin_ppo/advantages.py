"""Rewards of tokens, generalised advantage estimation and whitening.

N own tokens of an answer, in their order; what another said between them counts as no time. Sources: arXiv 1506.02438 (GAE),
arXiv 1707.06347 (PPO), arXiv 2203.02155 (KL in the reward).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def token_rewards(score: float, divergence: torch.Tensor | None, kl: float, count: int) -> torch.Tensor:
    """The reward of each token: -kl x (log policy - log reference), and the answer's score with the last one: [N].

    divergence: log policy - log reference of each token [N]; None where there is no reference.
    """
    rewards = torch.zeros(count) if divergence is None else -kl * divergence
    rewards = rewards.clone()
    if count:
        rewards[-1] += score
    return rewards


def estimate(rewards: torch.Tensor, values: torch.Tensor, gamma: float, lam: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The advantage of each token, and the return that its value is to tell: [N], [N] -> [N], [N].

    delta_t = r_t + gamma v_{t+1} - v_t, 0 for the value after the last token; A_t = delta_t + gamma lam A_{t+1};
    returns = A + v.
    """
    given, told, found = rewards.tolist(), values.tolist(), [0.0] * len(values)
    later = following = 0.0
    for t in range(len(told) - 1, -1, -1):
        later = given[t] + gamma * following - told[t] + gamma * lam * later
        found[t], following = later, told[t]
    advantages = torch.tensor(found, dtype=values.dtype)
    return advantages, advantages + values


def moments(parts: Sequence[tuple[float, float, int]]) -> tuple[float, float]:
    """Mean and variance (n - 1 in the denominator) of values of which each part tells sum, sum of squares and count."""
    total, squares, count = (sum(values) for values in zip(*parts, strict=True)) if parts else (0.0, 0.0, 0)
    if not count:
        return 0.0, 1.0
    mean = total / count
    return mean, max(0.0, squares - count * mean**2) / (count - 1) if count > 1 else 0.0


def sums_of(values: Sequence[torch.Tensor]) -> tuple[float, float, int]:
    """What `moments` needs of some values, in double precision."""
    whole = torch.cat([value.double() for value in values]) if values else torch.zeros(0, dtype=torch.float64)
    return float(whole.sum()), float((whole**2).sum()), len(whole)


def whitened(values: torch.Tensor, mean: float, variance: float, shift: bool = True) -> torch.Tensor:
    """To mean 0 and variance 1; without `shift` the mean stays."""
    found = (values - mean) / (variance + 1e-8) ** 0.5
    return found if shift else found + mean
