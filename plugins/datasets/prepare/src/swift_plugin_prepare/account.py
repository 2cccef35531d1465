"""What became of every row: counts by reason, and each row that did not go through whole.

Counts are added up over the chunks that workers prepare; the listed rows go to disk chunk by chunk, never into memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from swift_core.parts import join, parts
from swift_core.types import Sample

Overflow = Literal["drop", "truncate-left", "truncate-right", "split"]


@dataclass
class Account:
    """Counts of one split. `rows`, `samples` and tokens are those of an epoch; a row that is refused, dropped, cut or split is
    counted once, however often it stands in the epoch. `issues` lists such rows until they are written."""

    rows: int = 0
    samples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    reasons: Counter[str] = field(default_factory=Counter)  # rows by reason
    lost_tokens: Counter[str] = field(default_factory=Counter)  # tokens by reason
    notes: Counter[str] = field(default_factory=Counter)  # samples by note of the template
    issues: list[dict[str, Any]] = field(default_factory=list)

    def issue(self, where: str, what: str, reason: str, tokens: int = 0) -> None:
        self.reasons[what] += 1
        self.lost_tokens[what] += tokens
        self.issues.append({"where": where, "what": what, "reason": reason, "tokens": tokens})

    def add(self, other: Account) -> None:
        """Take over the counts of a part, not its list."""
        for item in fields(self)[:-1]:
            mine, more = getattr(self, item.name), getattr(other, item.name)
            if isinstance(mine, Counter):
                mine.update(more)
            else:
                setattr(self, item.name, mine + more)

    def summary(self) -> dict[str, Any]:
        values = {item.name: getattr(self, item.name) for item in fields(self)[:-1]}
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in values.items()}

    @classmethod
    def load(cls, summary: dict[str, Any]) -> Account:
        counters: dict[str, Any] = {name: Counter(summary[name]) for name in ("reasons", "lost_tokens", "notes")}
        return cls(**{name: summary[name] for name in ("rows", "samples", "tokens", "trained_tokens")}, **counters)


def fitter(max_length: int | None, overflow: Overflow, account: Account) -> Callable[[Sample], list[Sample]]:
    """A function that makes a sample at most `max_length` tokens long, and accounts for what it does."""

    def fit_joined(sample: Sample) -> list[Sample]:
        """Samples that belong together: each is to fit, and all go where one cannot stay."""
        whole, found = parts(sample), list[Sample]()
        if len(whole) < 2:
            return fit(sample)
        for part in whole:
            kept = fit(part)
            if not kept:
                return []
            found += kept
        return [replace(join(found, **sample.label), text=sample.text, spans=sample.spans)]

    def fit(sample: Sample) -> list[Sample]:
        length = len(sample.input_ids)
        if max_length is None or length <= max_length:
            return [sample]
        reason = f"{length} tokens, max_length {max_length}"
        halves = isinstance(sample.label, dict) and "encoder" in sample.label
        if (sample.media or halves) and overflow != "drop":
            what = "a sample with media" if sample.media else "a sample of an encoder-decoder"
            account.issue(sample.where, "dropped", f"{reason}: {what} is not cut", length)
            return []
        if overflow == "drop":
            account.issue(sample.where, "dropped", reason, length)
            return []
        if overflow == "split":
            account.issue(sample.where, "split", reason)
            return [_cut(sample, start, start + max_length) for start in range(0, length, max_length)]
        left = overflow == "truncate-left"
        piece = _cut(sample, length - max_length, length) if left else _cut(sample, 0, max_length)
        if not piece.trained_tokens:
            account.issue(sample.where, "dropped", f"{reason}: no trained token is left after {overflow}", length)
            return []
        lost = sample.trained_tokens - piece.trained_tokens
        if lost:
            end = ", the end of the last answer with them" if sample.weights[-1] and not left else ""
            reason += f": {lost} trained tokens lost{end}"
        account.issue(sample.where, "answer cut" if lost else "cut", reason, length - max_length)
        return [piece]

    return fit_joined


def _cut(sample: Sample, start: int, end: int) -> Sample:
    return replace(sample, input_ids=sample.input_ids[start:end], weights=sample.weights[start:end], spans=[])
