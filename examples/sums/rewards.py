"""Two rewards of the sums: the form of an answer, and whether it is right."""

from __future__ import annotations

import re
from typing import Any


def form(completions: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """1 for one short line."""
    return [float(bool(re.fullmatch(r"[^\n]{1,20}", said.strip()))) for said in completions]


def right(completions: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """1 where the last number is the row's solution."""
    found = [re.findall(r"\d+", said) for said in completions]
    return [float(bool(numbers) and numbers[-1] == row["solution"]) for numbers, row in zip(found, rows, strict=True)]
