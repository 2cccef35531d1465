"""Rewards and environments of the tests, as a user writes them."""

from __future__ import annotations

import time
from typing import Any


def letter(completions: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """The share of an answer that is the row's letter."""
    return [said.count(row["letter"]) / max(1, len(said)) for said, row in zip(completions, rows, strict=True)]


def even(completions: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """As `letter`, but for rows of an odd number all answers are worth the same."""
    return [value * (row["number"] % 2 == 0) for value, row in zip(letter(completions, rows), rows, strict=True)]


def same(completions: list[str], rows: list[dict[str, Any]]) -> list[float]:
    return [0.5 for _ in completions]


def broken(completions: list[str], rows: list[dict[str, Any]]) -> list[float]:
    raise KeyError("solution")


def few(completions: list[str], rows: list[dict[str, Any]]) -> list[float]:
    return [1.0]


def nothing(completions: list[str], rows: list[dict[str, Any]]) -> list[float]:
    return [float("nan") for _ in completions]


def hangs(completions: list[str], rows: list[dict[str, Any]]) -> list[float]:
    time.sleep(60)
    return same(completions, rows)


class Guess:
    """Says `again` until the third answer; each answer is worth its length."""

    def __init__(self) -> None:
        self.answers = 0

    def reset(self, row: dict[str, Any]) -> list[dict[str, Any]] | None:
        return [{"role": "user", "content": "begin"}]

    def step(self, message: dict[str, Any]) -> tuple[list[dict[str, Any]], float, bool]:
        self.answers += 1
        return [{"role": "user", "content": f"again {self.answers}"}], float(len(message["content"])), self.answers == 3


class Stuck(Guess):
    def step(self, message: dict[str, Any]) -> tuple[list[dict[str, Any]], float, bool]:
        time.sleep(60)
        return super().step(message)


class Faulty(Guess):
    def step(self, message: dict[str, Any]) -> tuple[list[dict[str, Any]], float, bool]:
        raise ValueError("no such move")


def seen(completions: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """The share of an answer that is letters. A row keeps what it shows."""
    for row in rows:
        parts = row["messages"][0]["content"]
        shown = sum(isinstance(part, dict) and part["type"] in ("image", "audio") for part in parts)
        assert len(row.get("images", row.get("audios", ()))) == shown
    return [sum(sign.isalpha() for sign in said) / max(1, len(said)) for said in completions]
