"""Options of the trainers `dpo`, `orpo`, `cpo`, `simpo` and `kto`. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from swift_core.config import option
from swift_plugin_supervised.config import SupervisedConfig

DPO_LOSSES = (
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft",
)  # fmt: skip
OF_DIFFERENCES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "discopop", "sft")
"""Losses of nothing but the difference of two scores: in it alone an f-divergence's unknown normaliser cancels."""
SMOOTHED = ("sigmoid", "sigmoid_norm", "robust", "exo_pair", "aot", "aot_unpaired")
"""Losses that label_smoothing changes."""


@dataclass
class PreferenceConfig(SupervisedConfig):
    """What the five share. A row of a pass is a pair, or a labelled answer."""

    batch_size: int = option(4, "pairs, or labelled answers, of one forward pass, in each process")
    batch_tokens: int | None = option(None, "fill passes with rows of like length up to so many tokens, in place of batch_size")
    learning_rate: float = option(1e-5, "highest learning rate")
    max_length: int | None = option(2048, "tokens of a prompt with its answer at most; null is no limit")
    overflow: Literal["drop", "truncate-left", "truncate-right"] = option(
        "drop", "what becomes of a longer one; a pair of which one side goes is dropped whole"
    )
    packing: bool = option(False, "not to be had: batch_tokens fills passes")
    share_beginning: bool = option(True, "compute the prompt of a pair once, where the model allows")
    beta: float = option(0.1, "how strongly the policy is held to its reference; the factor of rewards")

    def __post_init__(self) -> None:
        if self.packing:
            raise ValueError("packing is not to be had with pairs: set batch_tokens to fill passes")
        if self.beta <= 0:
            raise ValueError(f"beta must be above 0, not {self.beta}")
        super().__post_init__()


@dataclass
class Referring(PreferenceConfig):
    """What trainers with a reference share."""

    reference_ahead: bool = option(
        False, "compute the reference's log-probabilities once, before the first step, and keep them in the run's folder"
    )


@dataclass
class DpoConfig(Referring):
    """`trainer: {name: dpo, loss: sigmoid}`; several: `loss: [{name: sigmoid, weight: 0.8}, {name: sft, weight: 0.2}]`."""

    loss: str | list[str | dict[str, Any]] = option("sigmoid", f"one of {', '.join(DPO_LOSSES)}; or a list of name and weight")
    label_smoothing: float = option(0.0, "share of the pairs whose order is taken to be wrong")
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = option(
        "reverse_kl", "what holds the policy to its reference"
    )
    divergence_alpha: float = option(0.5, "alpha of divergence alpha")
    discopop_tau: float = option(0.05, "temperature of the loss discopop")
    rpo_alpha: float | None = option(None, "RPO: weight of -log p of the chosen answer, a mean over its tokens")
    ld_alpha: float | None = option(None, "LD-DPO: factor of the tokens that one answer has beyond the other's length")
    reference_free: bool = option(False, "without a reference, as if it held all answers equally likely")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.losses = weights_of(self.loss)
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be at least 0 and below 0.5, not {self.label_smoothing}")
        if self.label_smoothing and self.losses.keys().isdisjoint(SMOOTHED):
            raise ValueError(
                f"label_smoothing changes nothing with loss {', '.join(self.losses)}: {', '.join(SMOOTHED)} have it"
            )
        if "exo_pair" in self.losses and self.label_smoothing == 0:
            raise ValueError("loss exo_pair needs label_smoothing above 0; its authors use 1e-3")
        other = [name for name in self.losses if name not in OF_DIFFERENCES]
        if other and self.divergence != "reverse_kl":
            raise ValueError(
                f"divergence {self.divergence} cannot be had with loss {other[0]}: {', '.join(OF_DIFFERENCES)} can"
            )
        if self.discopop_tau <= 0:
            raise ValueError(f"discopop_tau must be above 0, not {self.discopop_tau}")
        if self.discopop_tau != DpoConfig.discopop_tau and "discopop" not in self.losses:
            raise ValueError("discopop_tau changes nothing without loss discopop")
        if self.divergence_alpha != DpoConfig.divergence_alpha and self.divergence != "alpha":
            raise ValueError("divergence_alpha changes nothing without divergence alpha")
        if self.rpo_alpha is not None and self.rpo_alpha < 0:
            raise ValueError(f"rpo_alpha must be at least 0 or null, not {self.rpo_alpha}")
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"ld_alpha must be between 0 and 1, not {self.ld_alpha}")
        if self.reference_free and self.reference_ahead:
            raise ValueError("reference_free has no reference for reference_ahead to compute; keep one of them")


@dataclass
class OrpoConfig(PreferenceConfig):
    """`trainer: {name: orpo, beta: 0.1}`: beta is the paper's lambda."""

    beta: float = option(0.1, "weight of the odds ratio's loss beside the imitation of the chosen answer")
    nll: Literal["all", "answer"] = option(
        "all", "what of the chosen conversation is imitated: prompt and answer, or the answer"
    )


@dataclass
class CpoConfig(PreferenceConfig):
    """`trainer: {name: cpo}`; with `loss: simpo` it is CPO-SimPO."""

    loss: Literal["sigmoid", "hinge", "ipo", "simpo"] = option("sigmoid", "what parts the two answers")
    cpo_alpha: float = option(1.0, "weight of the imitation of the chosen answer")
    gamma: float = option(0.5, "margin of the loss simpo")
    label_smoothing: float = option(0.0, "share of the pairs whose order is taken to be wrong")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cpo_alpha < 0:
            raise ValueError(f"cpo_alpha must be at least 0, not {self.cpo_alpha}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be at least 0 and below 0.5, not {self.label_smoothing}")
        if self.label_smoothing and self.loss in ("hinge", "ipo"):
            raise ValueError(f"label_smoothing changes nothing with loss {self.loss}: sigmoid, simpo have it")
        if self.gamma != type(self).gamma and self.loss != "simpo":
            raise ValueError(f"gamma changes nothing with loss {self.loss}: it is the margin of loss simpo")


@dataclass
class SimpoConfig(CpoConfig):
    """`trainer: {name: simpo, beta: 2.0, gamma: 1.0}`."""

    loss: Literal["simpo"] = option("simpo", "what parts the two answers")
    beta: float = option(2.0, "factor of the rewards, which are log-probabilities a token")
    gamma: float = option(1.0, "margin between the rewards")
    cpo_alpha: float = option(0.0, "weight of the imitation of the chosen answer: above 0 it is CPO-SimPO")


@dataclass
class KtoConfig(Referring):
    """`trainer: {name: kto, desirable: 1.33}`."""

    loss: Literal["kto", "apo_zero_unpaired"] = option(
        "kto", "kto, or APO zero of single answers, which needs no estimate of KL"
    )
    desirable: float = option(1.0, "weight of good answers")
    undesirable: float = option(1.0, "weight of bad answers")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference_ahead and self.loss == "kto":
            raise ValueError(
                "reference_ahead is not to be had with loss kto: its estimate of KL pairs prompts with other answers at each "
                "step; loss apo_zero_unpaired has none"
            )
        if min(self.desirable, self.undesirable) < 0 or max(self.desirable, self.undesirable) == 0:
            raise ValueError("desirable and undesirable must be at least 0, and not both 0")


def weights_of(loss: str | list[str | dict[str, Any]]) -> dict[str, float]:
    """Losses by name with their weights. Raises ValueError for one that is not known, or is written otherwise."""
    found: dict[str, float] = {}
    for item in [loss] if isinstance(loss, str) else loss:
        entry = {"name": item} if isinstance(item, str) else item
        if not isinstance(entry.get("name"), str) or not entry.keys() <= {"name", "weight"}:
            raise ValueError(f"loss: expected a name, or {{name: sigmoid, weight: 0.8}}, not {item!r}")
        name, weight = entry["name"], entry.get("weight", 1.0)
        if name not in DPO_LOSSES:
            near = get_close_matches(name, DPO_LOSSES, 1)
            hint = f"Did you mean: {near[0]}?" if near else f"Known: {', '.join(DPO_LOSSES)}"
            raise ValueError(f"loss: unknown loss {name!r}. {hint}")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
            raise ValueError(f"loss: the weight of {name} must be a number of at least 0, not {weight!r}")
        if name in found:
            raise ValueError(f"loss: {name} stands there twice")
        found[str(name)] = float(weight)
    if not found:
        raise ValueError("loss: the list is empty")
    if not any(found.values()):
        raise ValueError("loss: all weights are 0")
    return found
