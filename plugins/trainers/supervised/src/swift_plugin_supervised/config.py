"""Options of the trainers `sft` and `pt`. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from swift_core.config import option


@dataclass
class SupervisedConfig:
    """`trainer: {name: sft, epochs: 3}`. Steps are optimizer steps throughout."""

    epochs: float = option(1.0, "passes over the data")
    max_steps: int | None = option(None, "steps at most, whatever epochs says")
    batch_size: int = option(4, "rows of one forward pass, in each process; with packing, packs")
    batch_tokens: int | None = option(None, "fill passes with rows of like length up to so many tokens, in place of batch_size")
    accumulate: int = option(1, "forward passes a step: a step takes batch_size x accumulate x processes rows")
    learning_rate: float = option(1e-4, "highest learning rate")
    rates: dict[str, float] = option({}, "factors of the learning rate by part of the model: {vision: 0.1}")
    schedule: Literal["cosine", "linear", "constant"] = option("cosine", "how it falls after the warm-up")
    warmup: float = option(0.05, "warm-up: a share of the steps below 1, or a number of them")
    min_rate: float = option(0.0, "share of the learning rate that is left at the end")
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay")
    betas: list[float] = option([0.9, 0.999], "AdamW's decay of the gradient's mean and of its square")
    optimizer: str | None = option(None, "an optimizer part; default: the tuner's own, else AdamW")
    clip: float | None = option(1.0, "largest gradient norm; null is off")
    max_length: int | None = option(2048, "tokens of a sample at most; null is no limit")
    overflow: Literal["drop", "truncate-left", "truncate-right"] = option("drop", "what becomes of a longer sample")
    packing: bool = option(False, "fill rows with several samples up to max_length, isolated from each other")
    padding: Literal["auto", "always"] = option(
        "auto", "auto lays the samples of a pass end to end, isolated from each other, where the model allows; always pads"
    )
    share_beginning: bool = option(
        True, "compute once what all samples of a pass begin with, a system message say, where the model allows"
    )
    shuffle: bool = option(True, "another order each epoch, from the seed")
    eval_every: int | None = option(None, "evaluate every N steps; default: at the end of each epoch")
    save_every: int | None = option(None, "save every N steps; default: at each evaluation, and at the end")
    log_every: int = option(1, "report every N steps")
    keep: int = option(2, "newest checkpoints kept, besides the best; 0 keeps all")
    patience: int | None = option(None, "stop after N evaluations without a better loss")
    resume: bool | str = option(False, "true continues the output folder's last checkpoint; or a checkpoint's folder")

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("max_steps", "eval_every", "save_every", "batch_tokens", "max_length", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 or null, not {value}")
        if self.epochs <= 0:
            raise ValueError(f"epochs must be above 0, not {self.epochs}")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be above 0, not {self.learning_rate}")
        for part, rate in self.rates.items():
            if rate <= 0:
                raise ValueError(f"rates: {part}: expected more than 0, not {rate}; --freeze {part} leaves it alone")
        if self.warmup < 0 or not 0 <= self.min_rate <= 1:
            raise ValueError("warmup must be at least 0, and min_rate between 0 and 1")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas takes two numbers of at least 0 and below 1, not {self.betas}")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip must be above 0 or null, not {self.clip}")
        if self.weight_decay < 0 or self.keep < 0:
            raise ValueError("weight_decay and keep must be at least 0")
        if self.packing and self.max_length is None:
            raise ValueError("packing needs max_length: the size of a pack")
        if self.packing and self.padding == "always":
            raise ValueError("packing lays samples end to end: it cannot be had with padding: always")


@dataclass
class PretrainConfig(SupervisedConfig):
    """`trainer: {name: pt}`: as sft, and a longer text may be split."""

    overflow: Literal["split", "drop", "truncate-left", "truncate-right"] = option(
        "split", "what becomes of a longer text: split goes on in further samples"
    )
