"""From opened data sets to prepared samples: sampling, mixing, encoding, hold-out and length, with an account of all.

Nothing is dropped in silence: every row that is refused, dropped, cut or split is counted by reason and listed with its
file and line. Torch-free, and done before any rank starts.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from swift_core.errors import RequestError, RowError
from swift_core.events import EventSink
from swift_core.types import Data, Record, Sample, Template

Overflow = Literal["drop", "truncate-left", "truncate-right", "split"]


@dataclass
class Account:
    """What became of every row. `issues` lists each row that did not go through whole."""

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

    def summary(self) -> dict[str, Any]:
        return {
            "rows": self.rows, "samples": self.samples, "tokens": self.tokens, "trained_tokens": self.trained_tokens,
            "reasons": dict(self.reasons), "lost_tokens": dict(self.lost_tokens), "notes": dict(self.notes),
        }  # fmt: skip


def split_sample(name: str) -> tuple[str, int | None]:
    """`rows.jsonl#500` -> `("rows.jsonl", 500)`."""
    match = re.fullmatch(r"(.+)#(\d+)", name)
    return (match[1], int(match[2])) if match else (name, None)


def draw(records: list[Record], sample: int | None, seed: int) -> list[Record]:
    """`sample` random records, in their order; all where there are no more."""
    if sample is None or sample >= len(records):
        return records
    return [records[n] for n in sorted(random.Random(seed).sample(range(len(records)), sample))]


def repeat(records: list[Record], seed: int) -> list[Record]:
    """Each record `weight` times, source by source; of a fraction of a weight that share of the source, at random."""
    found: list[Record] = []
    for weight, source in groupby(records, key=lambda record: record.weight):
        rows, generator = list(source), random.Random(seed)
        extra = sorted(generator.sample(range(len(rows)), round((weight - int(weight)) * len(rows))))
        found += rows * int(weight) + [rows[n] for n in extra]
    return found


def hold_out(records: list[Record], holdout: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Rows for training and, chosen at random by the seed, a share (below 1) or a count for evaluation."""
    if holdout < 0:
        raise RequestError(f"holdout: expected a share below 1 or a count, not {holdout:g}")
    if not holdout:
        return records, []
    count = int(holdout) if holdout >= 1 else max(1, round(holdout * len(records)))
    if count >= len(records):
        raise RequestError(f"holdout: {count} rows kept back of {len(records)} leave none to train on")
    held = set(random.Random(seed).sample(range(len(records)), count))
    return [r for n, r in enumerate(records) if n not in held], [r for n, r in enumerate(records) if n in held]


def encode(
    records: Iterable[Record], template: Template, account: Account, bad_rows: str, fit: Callable[[Sample], list[Sample]]
) -> list[Sample]:
    """Samples of all records. A row that cannot be used raises RowError, or is counted with `bad_rows="skip"`."""
    samples: list[Sample] = []
    for number, record in enumerate(records):
        account.rows += 1
        try:
            for sample in encode_record(record, template, number):
                for piece in fit(sample):
                    piece.text = ""  # kept by inspect only: it would hold the data set in memory twice
                    samples.append(piece)
                    account.notes.update(piece.notes)
        except RowError as err:
            if bad_rows == "stop":
                raise RowError(err.where, f"{err.reason} (bad_rows=skip leaves such rows out, and counts them)") from None
            account.issue(err.where, "refused", err.reason)
    account.samples += len(samples)
    account.tokens += sum(len(sample.input_ids) for sample in samples)
    account.trained_tokens += sum(sample.trained_tokens for sample in samples)
    return samples


def encode_record(record: Record, template: Template, number: int) -> list[Sample]:
    """The samples of one record, numbered and located. Raises RowError with the reason to refuse it."""
    if record.refused:
        raise RowError(record.where, record.refused)
    try:
        samples = template.encode(record.row)
    except (ValueError, RequestError) as err:
        raise RowError(record.where, str(err)) from err
    if not any(sample.trained_tokens for sample in samples):
        raise RowError(
            record.where, "the row has no trainable token: no assistant message with content, or train: false on all"
        )
    return [replace(sample, row=number, where=record.where) for sample in samples]


def fitter(max_length: int | None, overflow: Overflow, account: Account) -> Callable[[Sample], list[Sample]]:
    """A function that makes a sample at most `max_length` tokens long, and accounts for what it does."""

    def fit(sample: Sample) -> list[Sample]:
        length = len(sample.input_ids)
        if max_length is None or length <= max_length:
            return [sample]
        reason = f"{length} tokens, max_length {max_length}"
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
        lost_answer = sample.trained_tokens - piece.trained_tokens
        account.issue(sample.where, "answer cut" if lost_answer else "cut", reason, length - max_length)
        return [piece]

    return fit


def _cut(sample: Sample, start: int, end: int) -> Sample:
    return replace(sample, input_ids=sample.input_ids[start:end], weights=sample.weights[start:end], spans=[])


def prepare(
    train: list[Record], evaluation: list[Record], template: Template, trainer_config: Any, bad_rows: str, events: EventSink
) -> tuple[Data, Account]:
    """Encode both splits. Raises RequestError when nothing is left to train on."""
    account = Account()
    fit = fitter(getattr(trainer_config, "max_length", None), getattr(trainer_config, "overflow", "drop"), account)
    samples = encode(events.track(train, "tokenizing"), template, account, bad_rows, fit)
    account_eval = Account()
    fit_eval = fitter(getattr(trainer_config, "max_length", None), getattr(trainer_config, "overflow", "drop"), account_eval)
    held = encode(events.track(evaluation, "tokenizing eval"), template, account_eval, bad_rows, fit_eval)
    if not samples:
        reasons = ", ".join(f"{count} {what}" for what, count in account.reasons.items()) or "the data set is empty"
        raise RequestError(f"dataset: no row is left to train on ({reasons} of {account.rows} rows)")
    account.issues += [{**issue, "split": "eval"} for issue in account_eval.issues]
    whole = {**account.summary(), "eval": account_eval.summary()}
    return Data(samples, held, whole), account


def fingerprint(data: Data) -> str:
    """A hash of all that is trained and evaluated on, in its order: a resumed run must have the same."""
    digest = hashlib.sha256()
    for split in (data.train, data.eval):
        digest.update(len(split).to_bytes(8))
        for sample in split:
            digest.update(array("q", sample.input_ids).tobytes() + array("d", sample.weights).tobytes())
    return digest.hexdigest()[:16]


def write_samples(path: Path, samples: list[Sample]) -> None:
    """One JSON object a line: how the parent hands its work to the ranks."""
    with path.open("w", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps(sample.to_json(), separators=(",", ":")) + "\n")


def read_samples(path: Path) -> list[Sample]:
    with path.open(encoding="utf-8") as file:
        return [Sample.from_json(json.loads(line)) for line in file]
