"""The rows to answer, as the model writes what they show."""

from __future__ import annotations

from typing import Any

from swift_core.session import Session
from swift_core.source import grounded
from swift_core.types import Record


def read_records(session: Session, template: Any) -> list[Record]:
    """The run's data set, with the boxes in its texts as `template` writes them. template: None for a model at an address."""
    records = session.records(session.config.dataset)
    if template is not None and any(record.row.get("objects") for record in records):
        return [grounded(record, template) for record in records]
    return records
