"""Rows through a model with a head: one object a line with its label, tags, vector or scores."""

from __future__ import annotations

from typing import Any

from swift_core.types import Record


def predict_chunk(engine: Any, records: list[Record], first: int) -> list[dict[str, Any]]:
    """What the engine says of each record, numbered from `first` on; one that cannot be used has its `error`."""
    engine.predict([])  # says so where the template is none of a model with a head
    rows: list[dict[str, Any]] = []
    samples, places = [], []
    for number, record in enumerate(records, first):
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
    return rows
