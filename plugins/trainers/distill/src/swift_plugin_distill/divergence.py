"""Divergences between a student's and a teacher's distributions, piece by piece over the trained positions.

Formulas: the generalised Jensen-Shannon divergence of arXiv 2306.13649, section 3. Shapes: N trained positions, n of a piece,
V vocabulary, k of the teacher's likeliest tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

LEAST = 1e-7  # probability that is always left to the tail, so that its logarithm is finite


@dataclass(frozen=True)
class Likeliest:
    """A teacher's likeliest tokens at each position: ids [N, k], and their log-probabilities [N, k] float32."""

    ids: torch.Tensor
    logprobs: torch.Tensor


def jensen_shannon(student: torch.Tensor, teacher: torch.Tensor, beta: float) -> torch.Tensor:
    """beta KL(teacher | m) + (1 - beta) KL(student | m) with m = beta teacher + (1 - beta) student; at 0 its scaled limit, the
    forward KL(teacher | student), at 1 the reverse one. Log-probabilities [n, V] -> [n]."""
    if beta == 0:
        return kl(teacher, student)
    if beta == 1:
        return kl(student, teacher)
    mixture = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p | q) of log-probabilities [n, V]: [n]."""
    return (p.exp() * (p - q)).sum(-1)


def with_tail(logprobs: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of some tokens [n, k], and of all others together: [n, k + 1]."""
    known = torch.logsumexp(logprobs, -1, keepdim=True).clamp(max=math.log1p(-LEAST))
    return torch.cat([logprobs, torch.log(-torch.expm1(known))], -1)


def alone(logprobs: torch.Tensor) -> torch.Tensor:
    """As if there were no other tokens."""
    return logprobs - torch.logsumexp(logprobs, -1, keepdim=True)


def divergence(
    outputs: Any, teacher: Any, weights: torch.Tensor, beta: float, temperature: float, tail: bool, chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum over trained positions of weight x divergence, and likewise of KL(teacher | student) without a gradient.

    outputs: the student's. teacher: `Outputs` of the same batch, or `Likeliest` (of the temperature already). weights: [N]. The
    logits of `chunk` positions exist at a time: what the gradient needs of them is computed again.
    """
    sparse = isinstance(teacher, Likeliest)
    width = outputs.trained_logits(slice(0, 0)).shape[-1]
    if not sparse:
        width = min(width, teacher.trained_logits(slice(0, 0)).shape[-1])  # one may be padded further than the other

    def piece(at: int) -> tuple[torch.Tensor, torch.Tensor]:
        part = slice(at, at + chunk)
        mine = torch.log_softmax(outputs.trained_logits(part)[:, :width].float() / temperature, -1)
        if sparse:
            close = with_tail if tail else alone
            theirs = close(teacher.logprobs[part].to(mine.device))
            mine = close(mine.gather(1, teacher.ids[part].to(mine.device)))
        else:
            with torch.no_grad():
                theirs = torch.log_softmax(teacher.trained_logits(part)[:, :width].float() / temperature, -1)
        found = jensen_shannon(mine, theirs, beta)
        told = found.detach() if beta == 0 else kl(theirs, mine.detach())
        return (found * weights[part]).sum(), (told * weights[part]).sum()

    loss, told = weights.new_zeros(()), weights.new_zeros(())
    if not len(weights):  # a zero that has a gradient
        return outputs.trained_logits(slice(0, 0)).sum(), told
    for at in range(0, len(weights), chunk):
        if torch.is_grad_enabled():
            own, other = checkpoint(piece, at, use_reentrant=False, preserve_rng_state=False)
        else:
            own, other = piece(at)
        loss, told = loss + own, told + other
    return loss, told


def likeliest(outputs: Any, top_k: int, temperature: float, width: int, chunk: int) -> Likeliest:
    """The `top_k` likeliest of the first `width` tokens by a teacher's outputs, computed piece by piece."""
    count = int(outputs.trained.sum())
    ids, logprobs = [], []
    with torch.no_grad():
        for at in range(0, count, chunk):
            logits = outputs.trained_logits(slice(at, at + chunk))[:, :width].float()
            found = torch.log_softmax(logits / temperature, -1).topk(min(top_k, logits.shape[-1]), -1)
            ids.append(found.indices)
            logprobs.append(found.values)
    if not ids:
        empty = torch.zeros(0, top_k)
        return Likeliest(empty.long(), empty)
    return Likeliest(torch.cat(ids), torch.cat(logprobs))
