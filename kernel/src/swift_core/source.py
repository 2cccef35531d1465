"""The rows of a run: opened data sets with how each is sampled and weighted, and what a template makes of one row."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import compress, islice
from typing import Any

from swift_core.errors import RequestError, RowError, RunError, SwiftError, one_line
from swift_core.types import Dataset, RawDataset, Record, Sample, Template


@dataclass
class Source:
    """One data set of a run. `sample`: so many random rows; `first`, `stop`: only rows from the one to before the other."""

    name: str
    dataset: Dataset
    sample: int | None = None
    weight: float = 1.0  # how often a row stands in an epoch; a fraction of it is a chance
    evaluation: bool = False
    first: int = 0
    stop: int | None = None
    component: Any = None  # the `Chosen` that opened it
    chosen: bytes | None = None  # flags, set by `draw`

    def raws(self) -> Iterator[Any]:
        rows = self.dataset.raw() if isinstance(self.dataset, RawDataset) else iter(self.dataset)
        return islice(compress(rows, self.chosen) if self.chosen else rows, self.first, self.stop)

    def record(self, raw: Any) -> Record:
        return raw if isinstance(raw, Record) else self._parse(raw)

    def _parse(self, raw: Any) -> Record:
        return self.dataset.record(raw)  # type: ignore[attr-defined,no-any-return]

    @property
    def label(self) -> str:
        return f"{'eval_dataset' if self.evaluation else 'dataset'} {self.name!r}"

    def draw(self, seed: int, warn: Callable[[str], None]) -> int:
        """Choose `sample` random rows, all where there are no more. Returns how many are chosen."""
        count = sum(1 for _ in self.raws())
        if self.sample is None:
            return count
        if self.sample > count:
            warn(f"{self.label} has {count} rows, {self.sample} were asked for")
        if self.sample < count:
            flags = bytearray(count)
            for n in random.Random(seed).sample(range(count), self.sample):
                flags[n] = 1
            self.chosen = bytes(flags)
        return min(count, self.sample)

    def records(self) -> Iterator[Record]:
        for raw in self.raws():
            record = self.record(raw)
            record.weight = self.weight
            yield record


def grounded(record: Record, template: Template) -> Record:
    """The record with the boxes in its texts written as the model writes them, or refused where that cannot be."""
    ground = getattr(template, "grounded", None)
    if record.refused or ground is None or not record.row.get("objects"):
        return record
    try:
        return replace(record, row=ground(record.row))
    except ValueError as err:
        return replace(record, refused=str(err))


def asked_media(row: dict[str, Any], count: int) -> dict[str, list[Any]]:
    """The references of a row without those that messages from number `count` on, its answer, show: for `Request.media`."""
    later = [part.get("type") for message in row["messages"][count:] for part in _parts(message)]
    held = {key: row.get(key) or [] for key in ("images", "videos", "audios")}
    return {key: items[: len(items) - later.count(key[:-1])] for key, items in held.items() if items}


def _parts(message: dict[str, Any]) -> list[Any]:
    content = message.get("content")
    return content if isinstance(content, list) else []


def split_sample(name: str) -> tuple[str, int | None]:
    """`rows.jsonl#500` -> `("rows.jsonl", 500)`."""
    match = re.fullmatch(r"(.+)#(\d+)", name)
    return (match[1], int(match[2])) if match else (name, None)


def encode_record(record: Record, template: Template, number: int) -> list[Sample]:
    """The samples of one record, numbered and located. Raises RowError with the reason to refuse it."""
    if record.refused:
        raise RowError(record.where, record.refused)
    try:
        samples = template.encode(record.row)
    except (ValueError, RequestError) as err:
        raise RowError(record.where, str(err)) from err
    except SwiftError:
        raise
    except Exception as err:
        raise RunError(f"{record.where}: the template failed on this row: {one_line(err)}") from err
    if not any(sample.trained_tokens for sample in samples):
        raise RowError(
            record.where, "the row has no trainable token: no assistant message with content, or train: false on all"
        )
    for sample in samples:
        sample.row, sample.where = number, record.where
    return samples


class SampleList(list[Sample]):
    """`Samples` held in memory, for few."""

    @property
    def lengths(self) -> Sequence[int]:
        return [len(sample.input_ids) for sample in self]
