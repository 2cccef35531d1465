"""Options of the trainer `grpo` and its presets, and of what they share with other on-policy trainers. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from swift_core.config import option

Advantage = Literal["group", "batch", "none", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "gdpo"]
Loss = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"]
Ratio = Literal["token", "sequence", "sequence_token", "answer"]


@dataclass
class ToolsConfig:
    """`environment_options: {functions: [tools.py:look_up]}`."""

    functions: list[str] = option([], "functions that the model may call, as FILE.py:NAME; rows name them in their tools")


@dataclass
class RolloutConfig:
    """What any on-policy loop needs: how many prompts and answers, how they are drawn, and how the policy is updated."""

    epochs: float = option(1.0, "passes over the prompts, where max_steps is not set")
    max_steps: int | None = option(None, "steps, over as many passes as they take, whatever epochs says")
    batch_size: int = option(4, "prompts of a step, in each process")
    learning_rate: float = option(1e-5, "highest learning rate")
    rates: dict[str, float] = option({}, "factors of the learning rate by part of the model: {vision: 0.1}")
    schedule: Literal["cosine", "linear", "constant"] = option("constant", "how it falls after the warm-up")
    warmup: float = option(0.0, "warm-up: a share of the updates below 1, or a number of them")
    min_rate: float = option(0.0, "share of the learning rate that is left at the end")
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay")
    betas: list[float] = option([0.9, 0.999], "AdamW's decay of the gradient's mean and of its square")
    optimizer: str | None = option(None, "an optimizer part; default: the tuner's own, else AdamW")
    clip: float | None = option(1.0, "largest gradient norm; null is off")
    max_length: int | None = option(2048, "tokens of a prompt at most; null is no limit")
    overflow: Literal["drop"] = option("drop", "what becomes of a longer prompt")
    padding: Literal["auto", "always"] = option(
        "auto", "auto lays answers end to end, isolated from each other, where the model allows; always pads"
    )
    share_beginning: bool = option(True, "compute the prompt once for all answers to it, where the model allows")
    shuffle: bool = option(True, "another order of prompts each epoch, from the seed")
    max_tokens: int = option(256, "tokens of an answer at most; in a talk, of all the model's own")
    temperature: float = option(1.0, "of rollouts, and of the log-probabilities that are trained on")
    top_p: float = option(1.0, "share of the likeliest tokens that answers are drawn from")
    top_k: int = option(0, "number of the likeliest tokens that answers are drawn from; 0: all")
    min_p: float = option(0.0, "tokens less likely than this share of the likeliest are left out")
    repetition_penalty: float = option(1.0, "of tokens seen before; 1 is off")
    stop: list[str] = option([], "texts that end an answer")
    rewards: list[Any] = option([], "rewards: an id, FILE.py:FUNCTION, or {name, weight, options}")
    environment: str | None = option(None, "what the model talks to: FILE.py:CLASS or a part, tools for example")
    environment_options: dict[str, Any] = option({}, "options of the environment")
    turns: int = option(8, "answers of a talk at most, where there is an environment")
    timeouts: dict[str, float] = option(
        {}, "seconds of a stage: rollouts, environment, rewards, log-probabilities, update, sync, save; 0: no limit"
    )
    log_every: int = option(1, "report every N steps")
    samples: int = option(4, "answers of a step that the log and the report show; 0: none")
    eval_every: int | None = option(None, "score the answers to the evaluation rows every N steps; default: at the end")
    save_every: int | None = option(None, "save every N steps; default: at the end")
    keep: int = option(2, "newest checkpoints kept, besides the best; 0 keeps all")
    resume: bool | str = option(False, "true continues the output folder's last checkpoint; or a checkpoint's folder")

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_tokens", "turns", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("max_steps", "eval_every", "save_every", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 or null, not {value}")
        for name in ("epochs", "learning_rate", "temperature", "repetition_penalty"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        for part, rate in self.rates.items():
            if rate <= 0:
                raise ValueError(f"rates: {part}: expected more than 0, not {rate}; --freeze {part} leaves it alone")
        if not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1 or self.top_k < 0:
            raise ValueError("top_p must be in (0, 1], min_p in [0, 1], and top_k at least 0")
        if self.warmup < 0 or not 0 <= self.min_rate <= 1:
            raise ValueError("warmup must be at least 0, and min_rate between 0 and 1")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas takes two numbers of at least 0 and below 1, not {self.betas}")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip must be above 0 or null, not {self.clip}")
        if self.weight_decay < 0 or self.keep < 0 or self.samples < 0:
            raise ValueError("weight_decay, keep and samples must be at least 0")
        unknown = sorted(set(self.timeouts) - set(STAGES))
        if unknown:
            raise ValueError(f"timeouts: there is no stage {unknown[0]!r}; there are {', '.join(STAGES)}")
        if any(seconds < 0 for seconds in self.timeouts.values()):
            raise ValueError("timeouts must be at least 0 seconds")


STAGES = ("rollouts", "environment", "rewards", "log-probabilities", "update", "sync", "save")
TIMEOUT = 1800.0
"""Seconds of a stage that `timeouts` does not name."""


@dataclass
class GrpoConfig(RolloutConfig):
    """`trainer: {name: grpo, loss: dapo, clip_high: 0.28}`: one loop, whose parts are chosen here."""

    generations: int = option(8, "answers to each prompt")
    updates: int = option(1, "passes over the answers of a step")
    minibatches: int = option(1, "optimizer steps of each pass; each takes whole groups")
    advantage: Advantage = option("group", "what an answer's reward is compared with")
    whiten: bool = option(False, "advantages of a step to mean 0 and spread 1")
    loss: Loss = option("grpo", "how the policy's ratio is bounded, and what the sum is divided by")
    ratio: Ratio = option(
        "token", "of tokens; sequence, sequence_token: GSPO's mean over an answer; answer: its product, as RLOO's"
    )
    clip_low: float = option(0.2, "the ratio counts down to 1 - clip_low")
    clip_high: float | None = option(
        None, "and up to 1 + clip_high; default: clip_low. cispo: the ratio's largest weight, as it is"
    )
    delta: float | None = option(None, "two-sided clipping: the largest ratio where the advantage is negative; null is off")
    kl: float = option(0.0, "weight of the divergence from the reference")
    kl_in: Literal["loss", "reward"] = option("loss", "where it stands: in the loss (k3), or taken from rewards (k1)")
    kl_unbiased: bool = option(True, "weigh the divergence in the loss by the ratio, which makes its gradient unbiased")
    tau_positive: float = option(1.0, "sapo: temperature of the gate where the advantage is positive")
    tau_negative: float = option(1.05, "sapo: and where it is not")
    overlong: Literal["keep", "filter"] = option("keep", "filter: answers cut at max_tokens are left out of the loss")
    overlong_margin: int = option(0, "DAPO's soft penalty: from so many tokens before max_tokens on, down to -1; 0 is off")
    resample: int = option(0, "dynamic sampling: how often groups without signal are drawn anew")
    entropy_share: float = option(1.0, "share of the tokens, those of the highest entropy, that the policy loss takes")
    exact_entropy: bool = option(False, "log the distributions' entropy; else it is told by the drawn tokens' -log p")
    old: Literal["trainer", "engine"] = option(
        "trainer", "whose log-probabilities are the old policy's; engine saves a pass, and trusts that they agree"
    )
    mismatch: Literal["none", "truncate", "mask"] = option(
        "none", "weigh by trainer's over engine's probability of what was drawn: truncated at mismatch_cap, or 0 beyond it"
    )
    mismatch_level: Literal["token", "answer"] = option("token", "of tokens, or of whole answers")
    mismatch_cap: float = option(2.0, "largest such weight")
    mismatch_floor: float = option(0.0, "smallest such weight")
    ahead: bool = option(False, "make the next step's rollouts while this one is trained on, by an engine in another process")
    sft: float = option(0.0, "CHORD: share mu of a supervised loss on the answers that rows end with, at its peak")
    sft_end: float = option(0.0, "share that it falls to")
    sft_warmup: int = option(0, "steps until the peak")
    sft_decay: int = option(0, "steps from the peak to the end; 0: it stays")
    sft_phi: bool = option(False, "weigh each of its tokens by p (1 - p)")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("generations", "updates", "minibatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.generations < 2 and self.advantage != "reinforce_plus_plus":
            raise ValueError(f"advantage {self.advantage} compares answers to one prompt: generations must be at least 2")
        for name in ("clip_low", "kl", "overlong_margin", "resample", "mismatch_floor", "sft_warmup", "sft_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        if self.clip_high is not None and self.clip_high < 0:
            raise ValueError(f"clip_high must be at least 0, not {self.clip_high}")
        if self.loss == "cispo" and self.clip_high is None:
            self.clip_high = 5.0  # a largest weight, not a distance from 1
        if self.delta is not None and self.delta <= 1:
            raise ValueError(f"delta must be above 1 or null, not {self.delta}")
        if self.overlong_margin > self.max_tokens:
            raise ValueError("overlong_margin must be at most max_tokens")
        if not 0 < self.entropy_share <= 1:
            raise ValueError(f"entropy_share must be in (0, 1], not {self.entropy_share}")
        if self.mismatch_cap <= self.mismatch_floor:
            raise ValueError("mismatch_cap must be above mismatch_floor")
        if not 0 <= self.sft <= 1 or not 0 <= self.sft_end <= 1:
            raise ValueError("sft and sft_end must be between 0 and 1")
        if self.sft_end and not self.sft_decay:
            raise ValueError("sft_end changes nothing without sft_decay: the steps that the share takes to fall to it")
        if self.delta is not None and self.loss in ("cispo", "sapo"):
            raise ValueError(f"delta changes nothing with loss {self.loss}, which does not clip on two sides")
        if self.tau_positive <= 0 or self.tau_negative <= 0:
            raise ValueError("tau_positive and tau_negative must be above 0")
        if self.ahead and self.resample:
            raise ValueError("ahead makes rollouts before the rewards are known: it cannot be had with resample")
        if self.advantage == "gdpo" and self.kl and self.kl_in == "reward":
            raise ValueError("advantage gdpo normalises each reward by itself: kl_in must be loss")
        if self.old == "engine" and self.mismatch != "none":
            raise ValueError("mismatch compares trainer and engine: old must be trainer")
        if self.old == "engine" and self.temperature != 1:
            raise ValueError("an engine tells log-probabilities of temperature 1: at another, old must be trainer")


@dataclass
class DrGrpoConfig(GrpoConfig):
    """Dr. GRPO (arXiv 2503.20783): no division by spread or length."""

    advantage: Advantage = option("none", "what an answer's reward is compared with")
    loss: Loss = option("dr_grpo", "how the policy's ratio is bounded, and what the sum is divided by")


@dataclass
class DapoConfig(GrpoConfig):
    """DAPO (arXiv 2503.14476): clip-higher, token-level loss, dynamic sampling."""

    loss: Loss = option("dapo", "how the policy's ratio is bounded, and what the sum is divided by")
    clip_high: float | None = option(0.28, "the ratio counts up to 1 + clip_high")
    resample: int = option(3, "dynamic sampling: how often groups without signal are drawn anew")


@dataclass
class GspoConfig(GrpoConfig):
    """GSPO (arXiv 2507.18071): ratios of whole answers, and narrow bounds."""

    ratio: Ratio = option("sequence", "of tokens; sequence, sequence_token: GSPO's mean over an answer; answer: its product")
    clip_low: float = option(3e-4, "the ratio counts down to 1 - clip_low")
    clip_high: float | None = option(4e-4, "and up to 1 + clip_high")


@dataclass
class CispoConfig(GrpoConfig):
    """CISPO (arXiv 2506.13585): the ratio is a bounded weight, and no token loses its gradient."""

    loss: Loss = option("cispo", "how the policy's ratio is bounded, and what the sum is divided by")
    clip_high: float | None = option(5.0, "the ratio's largest weight")


@dataclass
class SapoConfig(GrpoConfig):
    """SAPO (arXiv 2511.20347): a soft gate in place of clipping."""

    loss: Loss = option("sapo", "how the policy's ratio is bounded, and what the sum is divided by")


@dataclass
class RlooConfig(GrpoConfig):
    """RLOO (arXiv 2402.14740): compared with the other answers to the prompt, ratios of whole answers, KL in the reward."""

    advantage: Advantage = option("rloo", "what an answer's reward is compared with")
    ratio: Ratio = option("answer", "of tokens; sequence, sequence_token: GSPO's mean over an answer; answer: its product")
    kl: float = option(0.05, "weight of the divergence from the reference")
    kl_in: Literal["loss", "reward"] = option("reward", "where it stands: in the loss (k3), or taken from rewards (k1)")


@dataclass
class ReinforceConfig(GrpoConfig):
    """REINFORCE++ (arXiv 2501.03262): advantages of the whole batch, KL in the reward."""

    advantage: Advantage = option("reinforce_plus_plus", "what an answer's reward is compared with")
    kl: float = option(0.01, "weight of the divergence from the reference")
    kl_in: Literal["loss", "reward"] = option("reward", "where it stands: in the loss (k3), or taken from rewards (k1)")
