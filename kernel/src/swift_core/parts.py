"""Samples that belong together, held as one: a pair of answers, the answers to one prompt, a prompt with its row.

`join` puts them one after the other and notes in `label["lengths"]` how long each is; `parts` takes them apart again. So
prepared data, its order and its account know one kind of sample only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from swift_core.types import Sample


def join(samples: Sequence[Sample], **label: Any) -> Sample:
    """One sample of several, in their order. label: what else is to be kept of them, JSON values. Their media must be alike:
    they are kept once. Raises ValueError where they differ."""
    first = samples[0]
    if any(sample.media != first.media for sample in samples):
        raise ValueError("the parts of the row have different media")
    starts = [sum(len(sample.text) for sample in samples[:n]) for n in range(len(samples))]
    return replace(
        first,
        input_ids=[token for sample in samples for token in sample.input_ids],
        weights=[weight for sample in samples for weight in sample.weights],
        text="".join(sample.text for sample in samples),
        spans=[(at + a, at + b) for at, sample in zip(starts, samples, strict=True) for a, b in sample.spans],
        turns=[turn for sample in samples for turn in sample.turns],
        appended=next((sample.appended for sample in samples if sample.appended), None),
        notes=list(dict.fromkeys(note for sample in samples for note in sample.notes)),
        label={
            **label, "lengths": [len(sample.input_ids) for sample in samples], "texts": [len(s.text) for s in samples],
            "labels": [sample.label for sample in samples],
        },
    )  # fmt: skip


def parts(sample: Sample) -> list[Sample]:
    """What was joined: the samples with their ids, weights, label, media and, where it is known, text. A sample that was not
    joined is its only part."""
    if not isinstance(sample.label, dict) or "texts" not in sample.label:
        return [sample]
    found, at, text = [], 0, 0
    for length, size, label in zip(*(sample.label[name] for name in ("lengths", "texts", "labels")), strict=True):
        ids, weights = sample.input_ids[at : at + length], sample.weights[at : at + length]
        found.append(
            replace(sample, input_ids=ids, weights=weights, text=sample.text[text : text + size], spans=[], label=label)
        )
        at, text = at + length, text + size
    return found
