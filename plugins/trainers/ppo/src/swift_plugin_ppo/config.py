"""Options of the trainer `ppo`. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from swift_core.config import option
from swift_plugin_grpo.config import RolloutConfig


@dataclass
class PpoConfig(RolloutConfig):
    """`trainer: {name: ppo, rewards: [...]}`. The value model is `models.value`, else the model itself with a new head."""

    generations: int = option(1, "answers to each prompt")
    updates: int = option(4, "passes over the answers of a step")
    minibatches: int = option(1, "optimizer steps of each pass; each takes whole prompts")
    clip_low: float = option(0.2, "the policy's ratio counts down to 1 - clip_low")
    clip_high: float | None = option(None, "and up to 1 + clip_high; default: clip_low")
    value_clip: float | None = option(0.2, "how far a value may move from the one before the step; null is off")
    value_rate: float | None = option(None, "highest learning rate of the value model; default: learning_rate")
    value_warmup: int = option(0, "steps at the start that train the value model alone")
    gamma: float = option(1.0, "discount of later rewards, a token")
    lam: float = option(0.95, "lambda of generalised advantage estimation")
    whiten: bool = option(True, "bring all advantages of a step to mean 0 and variance 1")
    whiten_rewards: bool = option(False, "divide rewards by their spread over all tokens of a step, before the advantages")
    kl: float = option(0.05, "weight of the divergence from the reference, taken from each token's reward; 0: no reference")
    missing_end: float = option(0.0, "taken from the reward of an answer that is cut at max_tokens")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("generations", "updates", "minibatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("clip_low", "clip_high", "kl", "missing_end", "value_warmup"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, not {getattr(self, name)}")
        for name in ("value_clip", "value_rate"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0 or null, not {getattr(self, name)}")
