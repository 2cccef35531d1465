"""Rows through a model with a head: one object a line with its label, tags, vector or scores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from swift_core.types import Record

CHUNK = 32  # rows between two writes of the file


def predictions(engine: Any, records: list[Record], done: int) -> Iterator[dict[str, Any]]:
    """What the engine says of each record from number `done` on, in order; a row that cannot be used has its `error`."""
    engine.predict([])  # says so where the template is none of a model with a head
    for start in range(done, len(records), CHUNK):
        rows: list[dict[str, Any]] = []
        samples, places = [], []
        for number, record in enumerate(records[start : start + CHUNK], start):
            row: dict[str, Any] = {"row": number, "where": record.where}
            rows.append(row)
            try:
                if record.refused:
                    raise ValueError(record.refused)
                samples.append(engine.template.sample(record.row, labelled=False))
                places.append(row)
            except ValueError as err:
                row["error"] = str(err)
                continue
            row["messages"] = record.row["messages"]
            if record.row.get("label") is not None:
                row["reference"] = record.row["label"]
        for row, found in zip(places, engine.predict(samples) if samples else [], strict=True):
            row |= found
        yield from rows
