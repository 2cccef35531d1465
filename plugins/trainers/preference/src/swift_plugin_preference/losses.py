"""The losses of preference learning: each a pure function of log-probabilities that gives one number a pair, or an answer.

A log-probability is that of a whole answer: the sum over its tokens. Shapes: P pairs, N answers. Notation of the docstrings:
w the chosen answer, l the rejected one; r = log policy - log reference of an answer; d = score(w) - score(l), where score is r
unless a divergence says otherwise; b = beta, e = label_smoothing, s the logistic function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class Pairs:
    """Log-probabilities of P pairs, each [P] float32. The references have no gradient."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    reference_chosen: torch.Tensor
    reference_rejected: torch.Tensor
    chosen_tokens: torch.Tensor  # of the answer
    rejected_tokens: torch.Tensor
    nll: torch.Tensor  # -log p of the chosen tokens that are imitated, whatever `chosen` leaves out
    nll_tokens: torch.Tensor
    nll_scale: float = (
        1.0  # pairs / imitated tokens, of all that the mean loss is over: makes a mean over tokens of one over pairs
    )

    @property
    def chosen_ratio(self) -> torch.Tensor:
        return self.chosen - self.reference_chosen

    @property
    def rejected_ratio(self) -> torch.Tensor:
        return self.rejected - self.reference_rejected


@dataclass(frozen=True)
class Options:
    """What the losses are set by."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    divergence: str = "reverse_kl"
    divergence_alpha: float = 0.5
    discopop_tau: float = 0.05
    gamma: float = 0.5


PairLoss = Callable[[Pairs, Options], torch.Tensor]


# --- scores -----------------------------------------------------------------------------------------------------------


def score(ratio: torch.Tensor, options: Options) -> torch.Tensor:
    """f'(t) of an f-divergence at t = exp(ratio), up to a constant that no difference has (Wang et al. 2024, f-DPO, arXiv
    2309.16240, table 1). reverse_kl: log t. forward_kl: 1 - 1/t. js: log 2t/(t + 1). alpha: (t^(a-1) - 1)/(a - 1), whose limit
    at a = 1 is log t."""
    if options.divergence == "forward_kl":
        return 1 - torch.exp(-ratio)
    if options.divergence == "js":
        return math.log(2) + logsigmoid(ratio)
    power = options.divergence_alpha - 1
    if options.divergence == "alpha" and abs(power) >= 1e-6:
        return torch.expm1((power * ratio).clamp(max=80.0)) / power  # beyond it float32 has no exp
    return ratio


def delta(pairs: Pairs, options: Options) -> torch.Tensor:
    """d."""
    return score(pairs.chosen_ratio, options) - score(pairs.rejected_ratio, options)


def mean_delta(pairs: Pairs, options: Options) -> torch.Tensor:
    """d of scores that are divided by their answers' tokens."""
    chosen = score(pairs.chosen_ratio, options) / pairs.chosen_tokens
    return chosen - score(pairs.rejected_ratio, options) / pairs.rejected_tokens


def smoothed(margin: torch.Tensor, smoothing: float) -> torch.Tensor:
    """-(1 - e) log s(margin) - e log s(-margin): the logistic loss where a share e of the labels is wrong."""
    loss = -logsigmoid(margin)
    return loss if smoothing == 0 else (1 - smoothing) * loss - smoothing * logsigmoid(-margin)


# --- against a reference ----------------------------------------------------------------------------------------------


def sigmoid(pairs: Pairs, options: Options) -> torch.Tensor:
    """-log s(b d) (Rafailov et al. 2023, DPO, arXiv 2305.18290, equation 7); with e: its conservative form (Mitchell 2023, A
    note on DPO with noisy preferences, equation 3)."""
    return smoothed(options.beta * delta(pairs, options), options.label_smoothing)


def sigmoid_norm(pairs: Pairs, options: Options) -> torch.Tensor:
    """-log s(b d) with scores a token (Meng et al. 2024, arXiv 2405.14734, section 4.4: length-normalised DPO)."""
    return smoothed(options.beta * mean_delta(pairs, options), options.label_smoothing)


def hinge(pairs: Pairs, options: Options) -> torch.Tensor:
    """max(0, 1 - b d) (Zhao et al. 2023, SLiC, arXiv 2305.10425; Liu et al. 2024, RSO, arXiv 2309.06657, equation 10)."""
    return torch.relu(1 - options.beta * delta(pairs, options))


def ipo(pairs: Pairs, options: Options) -> torch.Tensor:
    """(d - 1/(2 b))^2 with scores a token (Azar et al. 2024, arXiv 2310.12036, equation 17, where b is tau; its authors'
    results are with the mean over tokens)."""
    return (mean_delta(pairs, options) - 1 / (2 * options.beta)) ** 2


def robust(pairs: Pairs, options: Options) -> torch.Tensor:
    """(-(1 - e) log s(b d) + e log s(-b d)) / (1 - 2 e): unbiased where a share e < 1/2 of the labels is flipped (Chowdhury et
    al. 2024, rDPO, arXiv 2403.00409, equation 12)."""
    margin, e = options.beta * delta(pairs, options), options.label_smoothing
    return (-(1 - e) * logsigmoid(margin) + e * logsigmoid(-margin)) / (1 - 2 * e)


def exo_pair(pairs: Pairs, options: Options) -> torch.Tensor:
    """KL(policy's preference || labels'), q = s(b d) against 1 - e (Ji et al. 2024, EXO, arXiv 2402.00856, equation 16)."""
    margin, e = options.beta * delta(pairs, options), options.label_smoothing
    won = torch.sigmoid(margin) * (logsigmoid(margin) - math.log1p(-e))
    return won + torch.sigmoid(-margin) * (logsigmoid(-margin) - math.log(e))


def nca_pair(pairs: Pairs, options: Options) -> torch.Tensor:
    """-log s(b r_w) - 1/2 log s(-b r_w) - 1/2 log s(-b r_l) (Chen et al. 2024, NCA, arXiv 2402.05369, equation 11 at K = 2)."""
    chosen, rejected = options.beta * pairs.chosen_ratio, options.beta * pairs.rejected_ratio
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def bco_pair(pairs: Pairs, options: Options) -> torch.Tensor:
    """-log s(b r_w) - log s(-b r_l) (Jung et al. 2024, BCO, arXiv 2404.04656, equation 8, reward shift 0)."""
    return -logsigmoid(options.beta * pairs.chosen_ratio) - logsigmoid(-options.beta * pairs.rejected_ratio)


def sppo_hard(pairs: Pairs, options: Options) -> torch.Tensor:
    """(r_w - 1/(2 b))^2 + (r_l + 1/(2 b))^2 (Wu et al. 2024, SPPO, arXiv 2405.00675, equation 4.7 with 1 for the chosen one's
    chance to win)."""
    return (pairs.chosen_ratio - 0.5 / options.beta) ** 2 + (pairs.rejected_ratio + 0.5 / options.beta) ** 2


def aot(pairs: Pairs, options: Options) -> torch.Tensor:
    """The logistic loss of b (policy's margin - reference's margin), each sorted over the P pairs: first-order stochastic
    dominance (Melnyk et al. 2024, AOT, arXiv 2406.05882, algorithm 1, paired)."""
    policy, reference = pairs.chosen - pairs.rejected, pairs.reference_chosen - pairs.reference_rejected
    return smoothed(options.beta * (policy.sort().values - reference.sort().values), options.label_smoothing)


def aot_unpaired(pairs: Pairs, options: Options) -> torch.Tensor:
    """The same of the chosen ratios against the rejected ones, each sorted (Melnyk et al. 2024, algorithm 1, unpaired)."""
    margin = pairs.chosen_ratio.sort().values - pairs.rejected_ratio.sort().values
    return smoothed(options.beta * margin, options.label_smoothing)


def apo_zero(pairs: Pairs, options: Options) -> torch.Tensor:
    """1 - s(b r_w) + s(b r_l): for chosen answers that are better than the model's own (D'Oosterlinck et al. 2024, APO, arXiv
    2408.06266, equation 7)."""
    return torch.sigmoid(-options.beta * pairs.chosen_ratio) + torch.sigmoid(options.beta * pairs.rejected_ratio)


def apo_down(pairs: Pairs, options: Options) -> torch.Tensor:
    """s(b r_w) + 1 - s(b (r_w - r_l)): for chosen answers that are worse than the model's own (D'Oosterlinck et al. 2024,
    equation 8)."""
    chosen, rejected = pairs.chosen_ratio, pairs.rejected_ratio
    return torch.sigmoid(options.beta * chosen) + torch.sigmoid(-options.beta * (chosen - rejected))


def discopop(pairs: Pairs, options: Options) -> torch.Tensor:
    """(1 - m) (-log s(b d)) + m exp(-b d) with m = s(b d / tau): log-ratio modulated (Lu et al. 2024, DiscoPOP, arXiv
    2406.08414, equation 5)."""
    margin = options.beta * delta(pairs, options)
    share = torch.sigmoid(margin / options.discopop_tau)
    return -logsigmoid(margin) * (1 - share) + torch.exp(-margin) * share


def sft(pairs: Pairs, options: Options) -> torch.Tensor:
    """-log p of the chosen tokens, a mean over all of them (MPO's generation loss: Wang et al. 2024, arXiv 2411.10442,
    equation 5)."""
    return pairs.nll * pairs.nll_scale


DPO: Mapping[str, PairLoss] = {
    "sigmoid": sigmoid, "sigmoid_norm": sigmoid_norm, "hinge": hinge, "ipo": ipo, "robust": robust, "exo_pair": exo_pair,
    "nca_pair": nca_pair, "bco_pair": bco_pair, "sppo_hard": sppo_hard, "aot": aot, "aot_unpaired": aot_unpaired,
    "apo_zero": apo_zero, "apo_down": apo_down, "discopop": discopop, "sft": sft,
}  # fmt: skip


def mixture(pairs: Pairs, losses: Mapping[str, float], options: Options, rpo_alpha: float | None = None) -> torch.Tensor:
    """The weighted sum of losses (MPO, arXiv 2411.10442, equation 1), and alpha -log p(w) / tokens of w (Pang et al. 2024, RPO,
    arXiv 2404.19733, equation 1): [P]."""
    total = torch.zeros_like(pairs.chosen)
    for name, weight in losses.items():
        total = total + weight * DPO[name](pairs, options)
    return total if rpo_alpha is None else total + rpo_alpha * pairs.nll / pairs.nll_tokens


def kept(logprobs: torch.Tensor, place: torch.Tensor, common: torch.Tensor, alpha: float) -> torch.Tensor:
    """logprobs [N] of tokens, a token beyond the first `common` of its answer times alpha: length-desensitised (Liu et al.
    2024, LD-DPO, arXiv 2409.06411, equation 10). place, common [N]: the token's number in its answer, from 0, and the
    tokens of the pair's shorter answer."""
    return torch.where(place < common, logprobs, alpha * logprobs)


# --- without a reference ----------------------------------------------------------------------------------------------


def odds_ratio(pairs: Pairs, options: Options) -> torch.Tensor:
    """-log s(log odds(w) - log odds(l)) b, of probabilities a token (Hong et al. 2024, ORPO, arXiv 2403.07691, equations 4 and
    7)."""
    chosen, rejected = pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens
    log_odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    return -options.beta * logsigmoid(log_odds)


def log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) of x < 0, without cancellation on either side of -log 2 (Maechler 2012)."""
    near = x > -math.log(2)
    small = torch.where(near, x, torch.full_like(x, -0.1))  # where the other branch is taken its gradient must be finite
    large = torch.where(near, torch.full_like(x, -1.0), x)
    return torch.where(near, torch.log(-torch.expm1(small)), torch.log1p(-torch.exp(large)))


def cpo_sigmoid(pairs: Pairs, options: Options) -> torch.Tensor:
    """-log s(b (log p(w) - log p(l))) (Xu et al. 2024, CPO, arXiv 2401.08417, equation 3)."""
    return smoothed(options.beta * (pairs.chosen - pairs.rejected), options.label_smoothing)


def cpo_hinge(pairs: Pairs, options: Options) -> torch.Tensor:
    """max(0, 1 - b (log p(w) - log p(l))) (Zhao et al. 2023, SLiC, arXiv 2305.10425)."""
    return torch.relu(1 - options.beta * (pairs.chosen - pairs.rejected))


def cpo_ipo(pairs: Pairs, options: Options) -> torch.Tensor:
    """(log p(w) a token - log p(l) a token - 1/(2 b))^2 (Azar et al. 2024, equation 17, without a reference)."""
    return (_a_token(pairs) - 1 / (2 * options.beta)) ** 2


def simpo(pairs: Pairs, options: Options) -> torch.Tensor:
    """-log s(b (log p(w) a token - log p(l) a token) - gamma) (Meng et al. 2024, SimPO, arXiv 2405.14734, equation 6)."""
    return smoothed(options.beta * _a_token(pairs) - options.gamma, options.label_smoothing)


def _a_token(pairs: Pairs) -> torch.Tensor:
    return pairs.chosen / pairs.chosen_tokens - pairs.rejected / pairs.rejected_tokens


CPO: Mapping[str, PairLoss] = {"sigmoid": cpo_sigmoid, "hinge": cpo_hinge, "ipo": cpo_ipo, "simpo": simpo}


# --- labelled answers -------------------------------------------------------------------------------------------------


def kto(ratio: torch.Tensor, good: torch.Tensor, kl: torch.Tensor, beta: float) -> torch.Tensor:
    """1 - s(b (r - z)) of a good answer, 1 - s(b (z - r)) of a bad one (Ethayarajh et al. 2024, KTO, arXiv 2402.01306, equation
    7 without the weights). ratio [N]; good [N] bool; kl: z, a number without a gradient."""
    sign = torch.where(good, 1.0, -1.0)
    return torch.sigmoid(-beta * sign * (ratio - kl))


def apo_zero_unpaired(ratio: torch.Tensor, good: torch.Tensor, kl: torch.Tensor, beta: float) -> torch.Tensor:
    """1 - s(b r) of a good answer, s(b r) of a bad one (D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7, each side
    alone). `kl` is not used."""
    return kto(ratio, good, torch.zeros_like(kl), beta)


KTO: Mapping[str, Callable[..., torch.Tensor]] = {"kto": kto, "apo_zero_unpaired": apo_zero_unpaired}
