"""Losses against formulas written out here, and options that are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from swift_core.config import build_options
from swift_core.errors import RequestError
from swift_plugin_preference import losses
from swift_plugin_preference.config import CpoConfig, DpoConfig, KtoConfig, OrpoConfig, SimpoConfig
from swift_plugin_preference.losses import Options, Pairs


def pairs(**changed: Any) -> Pairs:
    given = {
        "chosen": [-4.0, -9.0, -2.5], "rejected": [-5.0, -6.0, -2.0], "reference_chosen": [-4.5, -8.0, -3.0],
        "reference_rejected": [-4.5, -7.0, -1.0], "chosen_tokens": [2.0, 6.0, 3.0], "rejected_tokens": [4.0, 3.0, 2.0],
        "nll": [4.0, 9.0, 2.5], "nll_tokens": [2.0, 6.0, 3.0],
    }  # fmt: skip
    return Pairs(**{name: torch.tensor(values) for name, values in (given | changed).items()}, nll_scale=3 / 11)


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


MARGINS = [0.5 - -0.5, -1.0 - 1.0, 0.5 - -1.0]  # r_w - r_l of `pairs`


def test_smoothed_labels() -> None:
    """Conservative DPO: a share e of the pairs is the other way round."""
    found = losses.sigmoid(pairs(), Options(beta=0.5, label_smoothing=0.2))
    wanted = [-0.8 * math.log(sigma(0.5 * m)) - 0.2 * math.log(sigma(-0.5 * m)) for m in MARGINS]
    assert found.tolist() == pytest.approx(wanted, abs=1e-6)


def test_rpo_adds_the_mean_over_an_answers_tokens() -> None:
    found = losses.mixture(pairs(), {"sigmoid": 1.0}, Options(beta=0.5), rpo_alpha=0.3)
    wanted = [-math.log(sigma(0.5 * m)) + 0.3 * nll for m, nll in zip(MARGINS, (2.0, 1.5, 2.5 / 3), strict=True)]
    assert found.tolist() == pytest.approx(wanted, abs=1e-6)


def test_imitation_is_a_mean_over_tokens() -> None:
    assert float(losses.sft(pairs(), Options()).mean()) == pytest.approx((4 + 9 + 2.5) / 11, abs=1e-6)


def test_a_mixture_weighs_its_losses() -> None:
    one, other = losses.hinge(pairs(), Options()), losses.ipo(pairs(), Options())
    found = losses.mixture(pairs(), {"hinge": 0.25, "ipo": 2.0}, Options())
    assert torch.allclose(found, 0.25 * one + 2.0 * other)


def test_odds_ratio_by_probabilities() -> None:
    odds = [[p / (1 - p) for p in (math.exp(c / n), math.exp(r / m))] for c, n, r, m in ((-4, 2, -5, 4), (-9, 6, -6, 3))]
    wanted = [-0.2 * math.log(sigma(math.log(w / lose))) for w, lose in odds]
    assert losses.odds_ratio(pairs(), Options(beta=0.2)).tolist()[:2] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("x", [-1e-6, -0.01, -math.log(2), -0.7, -5.0, -60.0])
def test_log1mexp_and_its_gradient(x: float) -> None:
    value = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    found = losses.log1mexp(value)
    found.backward()  # type: ignore[no-untyped-call]
    assert float(found) == pytest.approx(math.log(-math.expm1(x)), rel=1e-9)
    assert value.grad is not None
    assert float(value.grad) == pytest.approx(-math.exp(x) / -math.expm1(x), rel=1e-6)


def test_scores_of_divergences() -> None:
    ratio = torch.tensor([-1.0, 0.3, 2.0])
    t = ratio.exp()
    assert torch.allclose(losses.score(ratio, Options(divergence="forward_kl")), 1 - 1 / t, atol=1e-6)
    assert torch.allclose(losses.score(ratio, Options(divergence="js")), torch.log(2 * t / (t + 1)), atol=1e-6)
    of_alpha = losses.score(ratio, Options(divergence="alpha", divergence_alpha=0.3))
    assert torch.allclose(of_alpha, (t**-0.7 - 1) / -0.7, atol=1e-5)
    assert torch.equal(losses.score(ratio, Options(divergence="alpha", divergence_alpha=1.0)), ratio)


def test_kto_by_its_formula() -> None:
    ratio, good = torch.tensor([0.5, -0.2]), torch.tensor([True, False])
    found = losses.kto(ratio, good, torch.tensor(0.1), 0.3)
    assert found.tolist() == pytest.approx([1 - sigma(0.3 * (0.5 - 0.1)), 1 - sigma(0.3 * (0.1 - -0.2))], abs=1e-6)


def test_simpo_by_its_formula() -> None:
    found = losses.simpo(pairs(), Options(beta=2.0, gamma=0.4))
    assert float(found[0]) == pytest.approx(-math.log(sigma(2.0 * (-4 / 2 - -5 / 4) - 0.4)), abs=1e-6)


def test_tokens_beyond_the_shorter_answer_count_less() -> None:
    logs, place, common = torch.tensor([-1.0, -2.0, -3.0, -1.0]), torch.tensor([0, 1, 2, 0]), torch.tensor([1, 1, 1, 1])
    assert losses.kept(logs, place, common, 0.5).tolist() == [-1.0, -1.0, -1.5, -1.0]


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (DpoConfig, {"loss": "sigmod"}, "loss: unknown loss 'sigmod'. Did you mean: sigmoid?"),
        (DpoConfig, {"loss": [{"name": "sft", "share": 1}]}, "loss: expected a name, or {name: sigmoid, weight: 0.8}"),
        (DpoConfig, {"loss": ["sft", "sft"]}, "loss: sft stands there twice"),
        (DpoConfig, {"loss": []}, "loss: the list is empty"),
        (DpoConfig, {"loss": [{"name": "sft", "weight": "much"}]}, "the weight of sft must be a number"),
        (DpoConfig, {"loss": "exo_pair"}, "loss exo_pair needs label_smoothing above 0"),
        (DpoConfig, {"loss": "bco_pair", "divergence": "js"}, "divergence js cannot be had with loss bco_pair: sigmoid"),
        (DpoConfig, {"label_smoothing": 0.5}, "label_smoothing must be at least 0 and below 0.5, not 0.5"),
        (DpoConfig, {"beta": 0}, "beta must be above 0, not 0"),
        (DpoConfig, {"ld_alpha": 2}, "ld_alpha must be between 0 and 1, not 2"),
        (DpoConfig, {"discopop_tau": 0}, "discopop_tau must be above 0"),
        (DpoConfig, {"packing": True}, "packing is not to be had with pairs"),
        (DpoConfig, {"reference_free": True, "reference_ahead": True}, "reference_free has no reference"),
        (DpoConfig, {"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing changes nothing with loss ipo"),
        (DpoConfig, {"discopop_tau": 0.1}, "discopop_tau changes nothing without loss discopop"),
        (DpoConfig, {"divergence_alpha": 0.1}, "divergence_alpha changes nothing without divergence alpha"),
        (DpoConfig, {"rpo_alpha": -1}, "rpo_alpha must be at least 0 or null, not -1"),
        (DpoConfig, {"loss": [{"name": "ipo", "weight": -1}]}, "the weight of ipo must be a number of at least 0, not -1"),
        (DpoConfig, {"loss": [{"name": "ipo", "weight": 0}]}, "loss: all weights are 0"),
        (CpoConfig, {"loss": "hinge", "label_smoothing": 0.1}, "label_smoothing changes nothing with loss hinge"),
        (CpoConfig, {"gamma": 1}, "gamma changes nothing with loss sigmoid"),
        (KtoConfig, {"reference_ahead": True}, "reference_ahead is not to be had with loss kto"),
        (KtoConfig, {"desirable": 0, "undesirable": 0}, "must be at least 0, and not both 0"),
        (CpoConfig, {"cpo_alpha": -1}, "cpo_alpha must be at least 0"),
        (OrpoConfig, {"nll": "none"}, "nll: expected"),
        (SimpoConfig, {"loss": "hinge"}, "loss: expected one of simpo"),
    ],
)
def test_an_option_that_cannot_be_is_one_line(config: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        build_options(config, options, "trainer.x")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_losses_are_written_in_three_ways() -> None:
    for written in ("sigmoid,sft", ["sigmoid", "sft"], [{"name": "sigmoid"}, {"name": "sft", "weight": 1}]):
        found: Any = build_options(DpoConfig, {"loss": written}, "trainer.dpo")
        assert found.losses == {"sigmoid": 1.0, "sft": 1.0}


def test_every_loss_has_a_name_in_the_options() -> None:
    from swift_plugin_preference.config import DPO_LOSSES

    assert set(DPO_LOSSES) == set(losses.DPO)
