"""Prompts of the serving benchmarks: fifty short ones about ordinary things, the same in every run."""

from __future__ import annotations

import random
from typing import Any

SUBJECTS = (
    "the sea", "bread", "a bicycle", "winter", "the moon", "honey", "a library", "rain", "an old clock", "mountains",
    "a garden", "paper", "salt", "a river", "birds", "glass", "a train", "music", "wood", "the desert", "tea", "a lighthouse",
    "iron", "a market", "snow",
)  # fmt: skip
QUESTIONS = ("Write three sentences about {}.", "What is {} good for? Explain it to a child, step by step.")


def prompts(count: int = 50) -> list[list[dict[str, Any]]]:
    """Conversations of one message each; at most 50."""
    texts = [question.format(subject) for question in QUESTIONS for subject in SUBJECTS]
    return [[{"role": "user", "content": text}] for text in texts[:count]]


def lengths(count: int, least: int, most: int) -> list[int]:
    """New tokens of each answer, the same in every run."""
    chance = random.Random(2)
    return [chance.randint(least, most) for _ in range(count)]
