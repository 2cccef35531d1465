"""Advantages and losses by themselves, against direct references."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from swift_plugin_grpo.advantages import advantages, has_signal, soft_overlong, spread
from swift_plugin_grpo.config import Advantage, GrpoConfig
from swift_plugin_grpo.losses import Tokens, normaliser, policy_loss, sft_share, supervised_loss

NAN = float("nan")
SCORES = torch.tensor([[1.0, 2.0, 3.0, 6.0], [0.0, 0.0, 1.0, 1.0]])
PARTS = torch.stack([SCORES, -SCORES * 0.5], -1)
WEIGHTS = torch.tensor([1.0, 1.0])


def of(kind: str, scores: torch.Tensor = SCORES, **more: Any) -> torch.Tensor:
    return advantages(kind, scores, torch.stack([scores, -scores * 0.5], -1), WEIGHTS, **more)


def test_advantages_by_hand() -> None:
    mean, deviation = 3.0, math.sqrt((4 + 1 + 0 + 9) / 3)
    assert of("none")[0].tolist() == [-2.0, -1.0, 0.0, 3.0]
    assert of("group")[0].tolist() == pytest.approx([(r - mean) / (deviation + 1e-4) for r in SCORES[0].tolist()])
    everything = [1.0, 2, 3, 6, 0, 0, 1, 1]
    middle = sum(everything) / 8
    whole = math.sqrt(sum((r - middle) ** 2 for r in everything) / 7)
    assert of("batch")[1].tolist() == pytest.approx([(r - 0.5) / (whole + 1e-4) for r in SCORES[1].tolist()])
    assert of("reinforce_plus_plus").flatten().tolist() == pytest.approx([(r - middle) / (whole + 1e-4) for r in everything])
    assert of("rloo")[0].tolist() == pytest.approx([1 - 11 / 3, 2 - 10 / 3, 3 - 9 / 3, 6 - 6 / 3])
    differences = [-2.0, -1, 0, 3, -0.5, -0.5, 0.5, 0.5]
    over = math.sqrt(sum(d**2 for d in differences) / 7) + 1e-4
    assert of("reinforce_plus_plus_baseline").flatten().tolist() == pytest.approx([d / over for d in differences])
    assert float(of("rloo", whiten=True).mean()) == pytest.approx(0, abs=1e-6)
    assert float(spread(of("rloo", whiten=True))) == pytest.approx(1, abs=1e-3)


def test_gdpo_normalises_each_reward_in_its_group() -> None:
    """Two rewards of very different size count alike, which a sum of them would not let them."""
    parts = torch.tensor([[[0.0, 100.0], [1.0, 0.0], [0.0, 0.0], [1.0, 100.0]]])
    found = advantages("gdpo", parts.sum(-1), parts, WEIGHTS)[0].tolist()
    assert found[0] == pytest.approx(found[1], abs=1e-3)
    assert found[3] > 0 > found[2]
    assert found[0] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    "kind", ["group", "batch", "none", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "gdpo"]
)
def test_what_is_not_scored_counts_for_nothing(kind: str) -> None:
    """An answer without a reward has no advantage and does not move the others' baseline; equal ones have none."""
    scores = torch.tensor([[1.0, 3.0, NAN, NAN], [2.0, 4.0, NAN, NAN]])
    found, alone = of(kind, scores), of(kind, scores[:, :2])
    assert found[:, 2:].abs().max() == 0
    assert torch.allclose(found[:, :2], alone)
    assert of(kind, torch.full((2, 4), 0.7)).abs().max() == 0
    assert of(kind, torch.full((2, 4), NAN)).abs().max() == 0


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("kind", get_args(Advantage))
def test_equal_rewards_teach_nothing(kind: str, whiten: bool) -> None:
    for reward, shape in ((0.1, (2, 4)), (0.3, (8, 8)), (0.7, (6, 5)), (1 / 3, (3, 7))):
        scores = torch.full(shape, reward)
        found = advantages(kind, scores, scores[..., None].clone(), torch.ones(1), whiten)
        assert not found.any()


def test_signal() -> None:
    scores = torch.tensor([[0.0, 0.0], [0.0, 1.0], [NAN, NAN], [0.5, NAN]])
    assert has_signal(scores).tolist() == [False, True, False, False]


def test_the_soft_penalty() -> None:
    assert soft_overlong(torch.tensor([10, 80, 90, 95, 100]), 100, 20).tolist() == [0.0, 0.0, -0.5, -0.75, -1.0]
    assert soft_overlong(torch.tensor([100]), 100, 0).tolist() == [0.0]


def tokens(**more: Any) -> Tokens:
    """Three answers of 2, 3 and 1 tokens."""
    return Tokens(torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([2, 3, 1]), torch.tensor([1.0, -2.0, 0.5]), **more)


LOGPROBS = torch.tensor([-1.0, -0.5, -2.0, -0.1, -0.7, -0.3])
OLD = torch.tensor([-1.3, -0.1, -1.0, -0.9, -0.7, -0.9])


@pytest.mark.parametrize(("low", "high", "delta"), [(0.2, None, None), (0.2, 0.28, None), (0.2, 0.28, 1.4)])
def test_clipping_is_ppos(low: float, high: float | None, delta: float | None) -> None:
    """Token by token, as the paper writes it (arXiv 1707.06347, equation 7)."""
    config = GrpoConfig(loss="bnpo", clip_low=low, clip_high=high, delta=delta)
    expected, counts = 0.0, [0, 0]
    for logprob, old, owner in zip(LOGPROBS.tolist(), OLD.tolist(), [0, 0, 1, 1, 1, 2], strict=True):
        ratio, advantage = math.exp(logprob - old), [1.0, -2.0, 0.5][owner]
        bounded = min(max(ratio, 1 - low), 1 + (low if high is None else high))
        expected -= min(min(ratio, delta or math.inf) * advantage, bounded * advantage)
        counts[0] += ratio < 1 - low and advantage < 0
        counts[1] += ratio > 1 + (low if high is None else high) and advantage > 0
    found = policy_loss(LOGPROBS, tokens(old=OLD), config)
    assert float(found.total) == pytest.approx(expected)
    assert [found.figures["clip_low"], found.figures["clip_high"]] == counts == [1, 2]


def test_gspo_of_tokens_has_the_sequences_ratio_and_the_tokens_gradient() -> None:
    """With the same advantage for all tokens of an answer, both forms have one value and one gradient (arXiv 2507.18071)."""
    found = []
    for ratio in ("sequence", "sequence_token"):
        logprobs = LOGPROBS.clone().requires_grad_()
        loss = policy_loss(logprobs, tokens(old=OLD), GrpoConfig(ratio=ratio, clip_low=10, clip_high=10)).total
        loss.backward()
        found.append((float(loss.detach()), logprobs.grad))
    assert found[0][0] == pytest.approx(found[1][0])
    assert torch.allclose(found[0][1], found[1][1], atol=1e-6)
    ratio = math.exp(float((LOGPROBS - OLD)[2:5].mean()))
    assert found[0][1][2:5].tolist() == pytest.approx([2.0 * ratio / 3] * 3, abs=1e-6)


def test_normalisers() -> None:
    def of_loss(loss: str, **more: Any) -> float:
        return normaliser(GrpoConfig(loss=loss, max_tokens=50, **more), 8, 200, 500)

    assert [of_loss(loss) for loss in ("grpo", "sapo", "bnpo", "dr_grpo", "dapo", "cispo")] == [8, 8, 200, 400, 500, 500]
    assert of_loss("dapo", minibatches=2) == 250


def test_chords_share_and_its_weight_of_tokens() -> None:
    config = GrpoConfig(sft=0.8, sft_end=0.2, sft_warmup=4, sft_decay=10)
    assert [sft_share(n, config) for n in (1, 2, 4)] == pytest.approx([0.2, 0.4, 0.8])
    assert sft_share(9, config) == pytest.approx(0.5)
    assert sft_share(14, config) == sft_share(99, config) == pytest.approx(0.2)
    assert sft_share(1, GrpoConfig()) == 0
    logprobs, weights = torch.tensor([0.5, 0.25]).log(), torch.tensor([1.0, 2.0])
    assert float(supervised_loss(logprobs, weights, False)) == pytest.approx(math.log(2) + 2 * math.log(4))
    expected = math.log(2) * 0.25 + 2 * math.log(4) * 0.1875
    assert float(supervised_loss(logprobs, weights, True)) == pytest.approx(expected)
