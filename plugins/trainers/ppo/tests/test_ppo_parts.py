"""GAE, whitening and clipping against a direct reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from swift_plugin_ppo.advantages import estimate, moments, sums_of, token_rewards, whitened
from swift_plugin_ppo.config import PpoConfig
from swift_plugin_ppo.losses import policy_loss, value_loss


def by_definition(rewards: torch.Tensor, values: torch.Tensor, gamma: float, lam: float) -> torch.Tensor:
    """Equation 16 of arXiv 1506.02438: the sum over later times of (gamma lambda)^l delta."""
    after = torch.cat([values[1:], torch.zeros(1)])
    delta = rewards + gamma * after - values
    return torch.stack([
        sum(((gamma * lam) ** n * delta[t + n] for n in range(len(delta) - t)), torch.zeros(())) for t in range(len(delta))
    ])  # fmt: skip


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 0.9), (1.0, 1.0), (0.9, 0.0)])
def test_advantages_are_those_of_the_definition(gamma: float, lam: float) -> None:
    torch.manual_seed(0)
    rewards, values = torch.randn(13), torch.randn(13)
    advantages, returns = estimate(rewards, values, gamma, lam)
    expected = by_definition(rewards, values, gamma, lam)
    torch.testing.assert_close(advantages, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(returns, expected + values, atol=1e-5, rtol=1e-5)
    if lam == 1.0:  # then returns are the rewards that follow
        torch.testing.assert_close(returns, rewards.flip(0).cumsum(0).flip(0), atol=1e-5, rtol=1e-5)
    if lam == 0.0:
        torch.testing.assert_close(returns[:-1], rewards[:-1] + gamma * values[1:], atol=1e-5, rtol=1e-5)


def test_an_answer_of_no_token() -> None:
    empty = torch.zeros(0)
    advantages, returns = estimate(token_rewards(1.0, None, 0.1, 0), empty, 1.0, 0.95)
    assert (len(advantages), len(returns)) == (0, 0)


def test_the_divergence_is_taken_from_each_token_and_the_score_comes_with_the_last() -> None:
    divergence = torch.tensor([0.5, -0.25, 1.0])
    torch.testing.assert_close(token_rewards(2.0, divergence, 0.1, 3), torch.tensor([-0.05, 0.025, 1.9]))
    torch.testing.assert_close(token_rewards(2.0, None, 0.1, 3), torch.tensor([0.0, 0.0, 2.0]))
    assert divergence[-1] == 1.0


def test_whitening_over_parts_is_that_of_all() -> None:
    torch.manual_seed(0)
    parts = [torch.randn(5) + 3, torch.randn(8) * 2, torch.randn(0)]
    whole = torch.cat(parts)
    mean, variance = moments([sums_of(parts[:1]), sums_of(parts[1:])])
    assert (mean, variance) == pytest.approx((float(whole.mean()), float(whole.var())), abs=1e-5)
    torch.testing.assert_close(whitened(whole, mean, variance), (whole - whole.mean()) / whole.std(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whitened(whole, mean, variance, shift=False).mean(), whole.mean(), atol=1e-5, rtol=1e-5)
    assert moments([]) == (0.0, 1.0)
    assert moments([(2.0, 4.0, 1)]) == (2.0, 0.0)


def test_clipping_by_cases() -> None:
    """Each side of each bound, by hand: ratio 1.5 and 0.5 with an advantage of either sign."""
    logprobs = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.1]).log().requires_grad_()
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, 2.0])
    loss, clipped = policy_loss(logprobs, torch.zeros(5), advantages, 0.2, 0.28)
    torch.testing.assert_close(loss, torch.tensor([-1.28, -0.5, 1.5, 0.8, -2.2]))
    assert clipped.tolist() == [True, False, False, True, False]
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, -0.5, 1.5, 0.0, -2.2]))  # no gradient where it is clipped


def test_values_are_clipped_around_the_old_ones() -> None:
    values = torch.tensor([1.0, 0.1, 1.0, -1.0]).requires_grad_()
    old, returns = torch.zeros(4), torch.tensor([2.0, 2.0, 0.5, -0.1])
    loss, clipped = value_loss(values, old, returns, 0.2)
    torch.testing.assert_close(loss, 0.5 * torch.tensor([1.8**2, 1.9**2, 0.5**2, 0.9**2]))
    assert clipped.tolist() == [True, False, False, False]
    loss.sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([0.0, -1.9, 0.5, -0.9]))
    torch.testing.assert_close(value_loss(values, old, returns, None)[0], 0.5 * (values - returns) ** 2)
    torch.manual_seed(0)
    old, moves = torch.randn(1000), 0.1 * torch.rand(1000)
    assert not value_loss(old + moves, old, torch.randn(1000), 0.2)[1].any()  # roundings are no clips


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"gamma": 1.1}, "gamma must be between 0 and 1, not 1.1"),
        ({"updates": 0}, "updates must be at least 1, not 0"),
        ({"value_clip": 0}, "value_clip must be above 0 or null, not 0"),
        ({"kl": -1}, "kl must be at least 0, not -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
    ],
)
def test_options_that_are_wrong(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        PpoConfig(**options)
