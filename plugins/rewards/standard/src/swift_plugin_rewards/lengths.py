"""Rewards of how long an answer is and how often it repeats itself: length, soft_overlong, repetition, cosine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from swift_core.errors import RequestError
from swift_core.types import Reward, Row

from swift_plugin_rewards.answer import raw_of
from swift_plugin_rewards.config import CosineConfig, LengthConfig, OverlongConfig, RepetitionConfig, Unit


class Measure:
    """Cuts an answer, its reasoning included, into tokens, words or characters.

    Tokens are those that were generated; of a plain text, those of the run's tokenizer. RequestError where there is neither.
    """

    def __init__(self, unit: Unit, processor: Any, reward: str) -> None:
        self.unit, self.reward = unit, reward
        self.tokenizer = getattr(processor, "tokenizer", processor)

    def __call__(self, answer: str) -> Sequence[Any]:
        if self.unit == "characters":
            return raw_of(answer)
        if self.unit == "words":
            return raw_of(answer).split()
        ids: Sequence[Any] | None = getattr(answer, "token_ids", None)
        if ids is not None:
            return ids
        if self.tokenizer is None:
            raise RequestError(
                f"reward.{self.reward}: the answer came as text alone, without its tokens; set unit to words or characters"
            )
        found: Sequence[Any] = self.tokenizer(raw_of(answer), add_special_tokens=False)["input_ids"]
        return found


def limit_of(given: int | None, run: Any, reward: str) -> int:
    """The longest answer: as given, else the trainer's. Raises RequestError where nobody says it."""
    found = given or getattr(getattr(run, "trainer_config", None), "max_tokens", None)
    if not found:
        raise RequestError(f"reward.{reward}: set max_tokens, the longest answer")
    return int(found)


class Length:
    def __init__(self, config: LengthConfig, measure: Measure) -> None:
        self.config, self.measure = config, measure

    def __call__(self, completions: list[str], rows: list[Row]) -> list[float]:
        return [self.of(len(self.measure(said))) for said in completions]

    def of(self, length: int) -> float:
        config = self.config
        outside = max(config.min - length, length - config.max if config.max is not None else 0, 0)
        return 1.0 if not outside else max(0.0, 1 - outside / config.slack) if config.slack else 0.0


class Overlong:
    """Soft overlong punishment, DAPO's equation 13."""

    def __init__(self, config: OverlongConfig, measure: Measure, limit: int) -> None:
        self.measure, self.limit = measure, limit
        self.cache = config.cache or max(1, limit // 5)
        if self.cache > limit:
            raise RequestError(f"reward.soft_overlong: cache must be at most max_tokens, {limit}, not {self.cache}")

    def __call__(self, completions: list[str], rows: list[Row]) -> list[float]:
        return [self.of(len(self.measure(said))) for said in completions]

    def of(self, length: int) -> float:
        begin = self.limit - self.cache
        return 0.0 if length <= begin else max(-1.0, (begin - length) / self.cache)


class Repetition:
    """penalty x (1 - different n-grams / all n-grams); 0 for an answer shorter than one."""

    def __init__(self, config: RepetitionConfig, measure: Measure) -> None:
        self.config, self.measure = config, measure

    def __call__(self, completions: list[str], rows: list[Row]) -> list[float]:
        return [self.of(self.measure(said)) for said in completions]

    def of(self, units: Sequence[Any]) -> float:
        if self.measure.unit == "words":
            units = [word.lower() for word in units]
        count = len(units) - self.config.n + 1
        if count < 1:
            return 0.0
        different = {tuple(units[at : at + self.config.n]) for at in range(count)}
        return (1 - len(different) / count) * self.config.penalty


class Cosine:
    """`accuracy` says whether an answer is right; None is passed on."""

    waits = True

    def __init__(self, config: CosineConfig, measure: Measure, limit: int, accuracy: Reward) -> None:
        self.config, self.measure, self.limit, self.accuracy = config, measure, limit, accuracy

    def __call__(self, completions: list[str], rows: list[Row]) -> list[float | None]:
        right: list[float | None] = list(self.accuracy(completions, rows))
        return [
            None if value is None else self.of(len(self.measure(said)), value >= 0.5)
            for said, value in zip(completions, right, strict=True)
        ]

    def of(self, length: int, right: bool) -> float:
        """CosFn of arXiv 2502.03373: from its value at no length to that at full length, along half a cosine."""
        if length >= self.limit:
            return self.config.exceeded
        start, end = self.config.correct if right else self.config.wrong
        return end + 0.5 * (start - end) * (1 + math.cos(math.pi * length / self.limit))

    def close(self) -> None:
        self.accuracy.close()  # type: ignore[attr-defined]
