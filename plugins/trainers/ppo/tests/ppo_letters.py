"""A reward of the tests, as a user writes it."""

from __future__ import annotations

from typing import Any


def letter(completions: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """The share of an answer that is the row's letter."""
    return [said.count(row["letter"]) / max(1, len(said)) for said, row in zip(completions, rows, strict=True)]
