"""Options of the trainer `gkd`. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from swift_core.config import option
from swift_plugin_supervised.config import SupervisedConfig


@dataclass
class GkdConfig(SupervisedConfig):
    """`trainer: {name: gkd, beta: 0.5}`, `models: {teacher: FOLDER}`."""

    teacher: Literal["model", "self"] = option(
        "model", "model: models.teacher, a folder or a server's address; self: the policy with what is tuned off"
    )
    beta: float = option(0.5, "0: forward divergence from the teacher; 1: reverse; between: generalised Jensen-Shannon")
    temperature: float = option(1.0, "what both models' logits are divided by")
    top_k: int = option(0, "compare the teacher's likeliest tokens only, so many; 0: all. A server needs it")
    tail: bool = option(True, "with top_k: count what is left of both distributions as one token more; false: leave it out")
    on_policy: float = option(0.5, "share lambda of the rows whose answer the model gives itself, drawn anew each step")
    max_tokens: int = option(256, "tokens of such an answer at most")
    sampling_temperature: float = option(1.0, "temperature that such an answer is drawn with")
    top_p: float = option(1.0, "share of the likeliest tokens that it is drawn from")
    chunk: int = option(256, "positions at which the logits of both models exist at once")
    timeouts: dict[str, float] = option({}, "seconds of a stage: rollouts, teacher, sync; 0: no limit")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must be between 0 and 1, not {self.beta}")
        if not 0 <= self.on_policy <= 1:
            raise ValueError(f"on_policy must be between 0 and 1, not {self.on_policy}")
        for name in ("temperature", "sampling_temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, not {self.top_k}")
        for name in ("max_tokens", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        unknown = sorted(set(self.timeouts) - {"rollouts", "teacher", "sync"})
        if unknown:
            raise ValueError(f"timeouts: there is no stage {unknown[0]!r}; there are rollouts, teacher, sync")
