"""Policy losses of the family on the tokens that the model made: the ratio, its bounds, what is added, what divides the sum.

Tokens of all answers of a batch stand one after the other. Shapes: N tokens, S answers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(slots=True)
class Tokens:
    """What a loss needs of a batch beside the policy's own log-probabilities."""

    owner: torch.Tensor  # [N] which answer each token belongs to
    lengths: torch.Tensor  # [S] tokens of each answer
    advantages: torch.Tensor  # [S]
    old: torch.Tensor | None = None  # [N] log-probabilities of the policy that is improved on; None: the present one's
    plain: torch.Tensor | None = None  # [N] those at temperature 1; None: `old` are
    reference: torch.Tensor | None = None  # [N]
    engine: torch.Tensor | None = None  # [N] of the engine that drew them
    kept: torch.Tensor | None = None  # [N] bool: tokens that the policy loss takes; None: all


@dataclass(slots=True)
class Loss:
    """`total`: the sum over answers and tokens, still to be divided by `normaliser`. `figures`: sums for the log."""

    total: torch.Tensor
    figures: dict[str, float]


def policy_loss(logprobs: torch.Tensor, tokens: Tokens, config: Any) -> Loss:
    """The family's loss. logprobs: [N], with the gradient. config: a `GrpoConfig`."""
    old = logprobs.detach() if tokens.old is None else tokens.old
    by_answer = torch.zeros(len(tokens.lengths), dtype=logprobs.dtype, device=logprobs.device)
    difference = logprobs - old
    log_ratio = level(config.ratio, difference, logprobs, tokens, by_answer)
    ratio, advantages = log_ratio.exp(), tokens.advantages[tokens.owner]
    figures: dict[str, float] = {}
    per_token, low, high = bounded(ratio, advantages, logprobs, config)
    figures |= {"clip_low": float(low.sum()), "clip_high": float(high.sum())}
    if tokens.kept is not None:
        per_token = per_token * tokens.kept
    if tokens.engine is not None:
        gap = ((old if tokens.plain is None else tokens.plain) - tokens.engine).detach()
        figures |= mismatch(gap)
        if config.mismatch != "none":
            weight = correction(gap, tokens, by_answer, config)
            figures["mismatch_weight"] = float(weight.sum())
            per_token = per_token * weight
    if config.kl and config.kl_in == "loss":
        assert tokens.reference is not None
        kl = k3(tokens.reference - logprobs)
        figures["kl"] = float(kl.detach().sum())
        if config.kl_unbiased:
            kl = kl * ratio
        per_token = per_token + config.kl * kl
    if config.loss in ("grpo", "sapo"):  # each answer's mean
        per_token = per_token / tokens.lengths.clamp(min=1)[tokens.owner]
    return Loss(per_token.sum(), figures)


def level(kind: str, difference: torch.Tensor, logprobs: torch.Tensor, tokens: Tokens, zeros: torch.Tensor) -> torch.Tensor:
    """The log of the ratio that each token counts with: its own; GSPO's mean over its answer (arXiv 2507.18071, equation 7),
    with the gradient of the token's own probability where it is sequence_token (equation 14); or its answer's sum, RLOO's.
    """
    if kind == "token":
        return difference
    sums = zeros.index_add(0, tokens.owner, difference)
    if kind == "answer":
        return sums[tokens.owner]
    means = (sums / tokens.lengths.clamp(min=1))[tokens.owner]
    return means if kind == "sequence" else logprobs - logprobs.detach() + means.detach()


def bounded(
    ratio: torch.Tensor, advantages: torch.Tensor, logprobs: torch.Tensor, config: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each token's loss [N], and which are bounded from below and from above.

    cispo (arXiv 2506.13585): the ratio as a weight without gradient, at most clip_high. sapo (arXiv 2511.20347): a gate.
    Else PPO's clipping, and with `delta` the two-sided one (arXiv 2505.07291).
    """
    upper = config.clip_low if config.clip_high is None else config.clip_high
    plain = ratio.detach()
    none = torch.zeros_like(plain, dtype=torch.bool)
    if config.loss == "cispo":
        return -plain.clamp(max=upper) * advantages * logprobs, none, (plain > upper) & (advantages > 0)
    if config.loss == "sapo":
        heat = torch.where(advantages > 0, config.tau_positive, config.tau_negative)
        return -torch.sigmoid(heat * (ratio - 1)) * 4 / heat * advantages, none, none
    clipped = ratio.clamp(1 - config.clip_low, 1 + upper)
    if config.delta is not None:
        ratio = ratio.clamp(max=config.delta)
    loss = -torch.min(ratio * advantages, clipped * advantages)
    return loss, (plain < 1 - config.clip_low) & (advantages < 0), (plain > 1 + upper) & (advantages > 0)


def k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """Schulman's estimate of the divergence, never negative: exp(x) - x - 1 of x = log reference - log policy."""
    return log_ratio.exp() - log_ratio - 1


def mismatch(gap: torch.Tensor) -> dict[str, float]:
    """Sums over tokens of how far trainer and engine are apart. gap: [N], log p of the trainer less the engine's."""
    return {"mismatch": float(gap.abs().sum()), "mismatch_kl": float(k3(gap).sum()), "mismatch_max": float(gap.abs().amax())}


def correction(gap: torch.Tensor, tokens: Tokens, zeros: torch.Tensor, config: Any) -> torch.Tensor:
    """Importance weights [N] for tokens that the engine drew with other probabilities than the trainer's: truncated to
    [floor, cap], or 0 outside of it (TIS and masked importance sampling)."""
    if config.mismatch_level == "answer":
        gap = zeros.index_add(0, tokens.owner, gap)[tokens.owner]
    weight = gap.exp()
    if config.mismatch == "truncate":
        return weight.clamp(config.mismatch_floor, config.mismatch_cap)
    return weight.masked_fill((weight < config.mismatch_floor) | (weight > config.mismatch_cap), 0.0)


def normaliser(config: Any, answers: int, tokens: int, tokens_of_step: int) -> float:
    """What the sum of a minibatch's losses is divided by. answers, tokens: of the minibatch, all ranks together;
    tokens_of_step: of all minibatches of a pass.

    grpo, sapo: answers. bnpo: tokens. dr_grpo: answers x max_tokens. dapo, cispo: the step's tokens, shared out evenly.
    """
    if config.loss in ("grpo", "sapo"):
        return float(max(answers, 1))
    if config.loss == "bnpo":
        return float(max(tokens, 1))
    if config.loss == "dr_grpo":
        return float(max(answers, 1) * config.max_tokens)
    return max(tokens_of_step, 1) / config.minibatches


def high_entropy(entropies: torch.Tensor, share: float) -> float:
    """The entropy from which on a token is among the `share` of the highest (arXiv 2506.01939)."""
    return float(torch.quantile(entropies.float(), 1 - share)) if len(entropies) else 0.0


def sft_share(step: int, config: Any) -> float:
    """CHORD's mu at a step (1-based; arXiv 2508.11408): up to the peak, then down to the end along a cosine."""
    if not config.sft:
        return 0.0
    if step <= config.sft_warmup:
        return float(config.sft * step / config.sft_warmup)
    if not config.sft_decay:
        return float(config.sft)
    done = min(1.0, (step - config.sft_warmup) / config.sft_decay)
    return float(config.sft_end + (config.sft - config.sft_end) * 0.5 * (1 + math.cos(math.pi * done)))


def supervised_loss(logprobs: torch.Tensor, weights: torch.Tensor, phi: bool) -> torch.Tensor:
    """The sum of weight x -log p of a good answer's tokens [N]; with `phi` each weighed by p (1 - p), so that neither what the
    model knows nor what is far from it moves it much."""
    loss = -logprobs * weights
    if phi:
        share = logprobs.detach().exp()
        loss = loss * share * (1 - share)
    return loss.sum()
