"""From logits to tokens: each row by its own request and its own random generator, whatever else is in the step.

Order: bias, penalties, processors of the engine, constraint, temperature, top_k, top_p, min_p. Log-probabilities are those
of the model itself: log softmax of its logits, before any of these (as OpenAI's and vLLM's are).
Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from swift_core.errors import RunError, SwiftError, one_line

from swift_plugin_torch.rows import Guess, Row

Processor = Callable[[list[int], torch.Tensor], torch.Tensor]
"""`processor(ids, logits) -> logits`: `ids` of prompt and answer so far, `logits` [V] float32."""
LIKELIEST = 256  # tokens that a top_p is first looked for among
NEVER = float("-inf")


def choose(logits: torch.Tensor, rows: Sequence[Row], processors: Sequence[Processor] = ()) -> list[int | None]:
    """A token for each row, added to it with its log-probability; sets `row.finish`. logits: [R, V], any precision.

    None where there is none: a row whose logits are not finite, which its owner must fail, or one that was finished since
    nothing was allowed. A row whose constraint or processor fails ends its own call, and no other.
    """
    logits = logits.float()
    sums = logits.logsumexp(-1)
    finite = sums.isfinite().tolist()
    likeliest = logits.argmax(-1).tolist()
    tokens: list[int | None] = [token if good else None for token, good in zip(likeliest, finite, strict=True)]
    altered = [n for n, row in enumerate(rows) if finite[n] and (processors or not row.plain)]
    if altered:
        for n, token in zip(altered, _altered(logits, [rows[n] for n in altered], altered, processors), strict=True):
            tokens[n] = token
    known = [token or 0 for token in tokens]
    scores = (logits.gather(-1, torch.tensor(known, device=logits.device)[:, None])[:, 0] - sums).tolist()
    for n, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        if row.call.cancelled:
            continue
        if token is None:
            row.finish = "stop" if finite[n] else None
            continue
        try:
            row.accept(token, scores[n], _top(logits[n], sums[n], row.request.top_logprobs))
        except Exception as err:
            row.call.fail(_own_fault(err))
    return tokens


def _own_fault(err: Exception) -> SwiftError:
    return err if isinstance(err, SwiftError) else RunError(f"the request's logits could not be changed: {one_line(err)}")


def _top(logits: torch.Tensor, total: torch.Tensor, count: int) -> list[tuple[int, float]]:
    if not count:
        return []
    values, ids = logits.topk(min(count, len(logits)))
    return list(zip(ids.tolist(), (values - total).tolist(), strict=True))


def _altered(
    logits: torch.Tensor, rows: Sequence[Row], places: Sequence[int], processors: Sequence[Processor]
) -> list[int | None]:
    """Tokens of rows whose choice is not simply the likeliest; None where nothing is allowed."""
    scores = logits[list(places)] if len(places) < len(logits) else logits.clone()
    for row, own in zip(rows, scores, strict=True):
        try:
            alter(row, own, processors)
        except Exception as err:
            row.call.fail(_own_fault(err))
    possible = scores.amax(-1).isfinite().tolist()
    found: list[int | None] = scores.argmax(-1).tolist()
    sampled = [n for n, row in enumerate(rows) if possible[n] and not row.greedy]
    if sampled:
        own = scores if len(sampled) == len(rows) else scores[sampled]
        for n, token in zip(sampled, draw(own, [rows[n] for n in sampled]), strict=True):
            found[n] = token
    return [token if good else None for token, good in zip(found, possible, strict=True)]


def alter(row: Row, scores: torch.Tensor, processors: Sequence[Processor]) -> None:
    """Apply bias, penalties, processors, min_tokens and constraint of a row to its logits [V], in place."""
    asked = row.request
    if asked.logit_bias:
        ids = torch.tensor(list(asked.logit_bias), device=scores.device)
        scores[ids] += torch.tensor(list(asked.logit_bias.values()), device=scores.device, dtype=scores.dtype)
    if asked.repetition_penalty != 1:
        if row.seen is None:
            row.seen = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
            row.seen[torch.tensor([*row.prompt.ids, *row.ids], device=scores.device, dtype=torch.long)] = True
        penalised = torch.where(scores < 0, scores * asked.repetition_penalty, scores / asked.repetition_penalty)
        torch.where(row.seen, penalised, scores, out=scores)
    if asked.presence_penalty or asked.frequency_penalty:
        if row.counts is None:
            ids = torch.tensor(row.ids, device=scores.device, dtype=torch.long)
            row.counts = torch.bincount(ids, minlength=len(scores)).to(scores.dtype)
        scores -= asked.presence_penalty * (row.counts > 0) + asked.frequency_penalty * row.counts
    for processor in processors:
        scores.copy_(processor([*row.prompt.ids, *row.ids], scores))
    if row.matcher is not None:
        row.matcher.restrict(scores, row.stops)
    if len(row.ids) < asked.min_tokens and row.stops:
        kept = scores[list(row.stops)]
        scores[list(row.stops)] = NEVER
        if row.matcher is not None and not bool(scores.isfinite().any()):  # the constraint allows nothing but the end
            scores[list(row.stops)] = kept


def draw(scores: torch.Tensor, rows: Sequence[Row]) -> list[int]:
    """A random token for each row: scores [R, V] -> R ids. Each row spends one number of its own generator, and one more where
    a guess of it has shares (Leviathan et al., arXiv 2211.17192): it is taken with probability min(1, p / q), and otherwise the
    token is drawn from what p has more than q."""
    shares = distribution(scores, rows)
    taken = {n: row.guess.token for n, row in enumerate(rows) if row.guess is not None and _taken(shares[n], row, row.guess)}
    found = drawn(shares, rows, taken)
    return [taken.get(n, token) for n, token in enumerate(found)]


def distribution(scores: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """What each row draws from: [R, V], not scaled to 1 where tokens are out."""
    heat = torch.tensor([[row.request.temperature] for row in rows], device=scores.device)
    shares = torch.softmax(scores / heat, -1)
    for own, row in zip(shares, rows, strict=True):
        restrict(own, row.request.top_k, row.request.top_p, row.request.min_p)
    return shares


def drawn(shares: torch.Tensor, rows: Sequence[Row], sure: Collection[int] = ()) -> list[int]:
    """Ids drawn from shares [R, V], by each row's own generator; those that are `sure` spend none."""
    sums = shares.cumsum(-1)  # the tokens stand in the order of their ids: equal shares cannot change places
    numbers = [[0.0 if n in sure else row.random.random()] for n, row in enumerate(rows)]
    goals = (torch.tensor(numbers, device=shares.device, dtype=torch.float64) * sums[:, -1:].double()).to(sums.dtype)
    found = torch.searchsorted(sums, goals, right=True)[:, 0].tolist()
    return [n if n < shares.shape[1] else int(own.argmax()) for n, own in zip(found, shares, strict=True)]


def _taken(shares: torch.Tensor, row: Row, guess: Guess) -> bool:
    """Whether a guess that was drawn from `guess.shares` stands; else `shares` [V] become those of another token, in place."""
    if guess.shares is None:
        return False
    shares /= shares.sum()
    if row.random.random() * float(guess.shares[guess.token]) < float(shares[guess.token]):
        return True
    rest = (shares - guess.shares).clamp_min_(0)
    if float(rest.sum()) > 0:  # nothing is left where both are the same up to rounding
        shares.copy_(rest)
    return False


def restrict(shares: torch.Tensor, top_k: int, top_p: float, min_p: float) -> None:
    """Set the shares [V] of tokens that are out to 0, in place; what is left is not scaled to 1."""
    size = len(shares)
    if 0 < top_k < size or top_p < 1:
        values, ids = shares.topk(top_k if 0 < top_k < size else min(LIKELIEST, size))
        whole = float(values.sum()) if 0 < top_k < size else 1.0  # top_p is a share of what top_k left
        if top_p < 1:
            if float(values.sum()) < top_p * whole:
                values, ids = shares.sort(descending=True)
            before = values.cumsum(-1) - values
            count = max(1, int((before < top_p * whole).sum()))
            values, ids = values[:count], ids[:count]
        shares.zero_()
        shares[ids] = values
    if min_p > 0:
        shares[shares < min_p * shares.amax()] = 0
