"""Options of each reward. Torch-free."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from swift_core.config import option

Unit = Literal["tokens", "words", "characters"]


@dataclass
class AccuracyConfig:
    """`{name: accuracy}`: 1 where the answer equals the row's, else 0."""

    reference: str | None = option(
        None, "the row's key with the right answer; default: solution, answer, label, else its last assistant message"
    )
    text: bool = option(False, "compare as text, case and outer punctuation aside, where the right answer is no mathematics")
    boxed: bool = option(False, "only what stands in \\boxed{} counts as an answer")
    timeout: float = option(10.0, "seconds for one comparison; after that the answer counts as wrong")

    def __post_init__(self) -> None:
        if self.timeout <= 0:
            raise ValueError(f"timeout must be above 0 seconds, not {self.timeout}")


@dataclass
class FormatConfig:
    """`{name: format, form: think_answer}`, or `{name: format, pattern: '...'}`: 1 for an answer of that form, else 0."""

    form: Literal["think", "think_answer"] = option(
        "think", "think: <think>...</think> and then text; think_answer: <think>...</think><answer>...</answer>"
    )
    pattern: str | None = option(
        None, "a regular expression that the whole answer must match, in place of form; . is any character"
    )
    opened: bool = option(False, "the prompt ends with <think>, so that the answer begins inside of it")

    def __post_init__(self) -> None:
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as err:
                raise ValueError(f"pattern is not a regular expression: {err}") from None


@dataclass
class CosineConfig(AccuracyConfig):
    """`{name: cosine, max_tokens: 1024}`: from the first to the second number as the answer grows to max_tokens."""

    correct: list[float] = option([1.0, 0.5], "a right answer's reward: of no length, and of full length")
    wrong: list[float] = option([-0.5, 0.0], "a wrong answer's reward: of no length, and of full length")
    exceeded: float = option(-0.5, "reward of an answer of max_tokens or more")
    max_tokens: int | None = option(None, "full length in units; default: the trainer's max_tokens")
    unit: Unit = option("tokens", "what is counted")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("correct", "wrong"):
            if len(getattr(self, name)) != 2:
                raise ValueError(f"{name} takes two numbers, not {getattr(self, name)}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}")


@dataclass
class RepetitionConfig:
    """`{name: repetition, n: 3}`: penalty x the share of n-grams that stood before."""

    n: int = option(3, "length of an n-gram")
    penalty: float = option(-1.0, "reward of an answer that only repeats itself")
    unit: Unit = option("words", "what n-grams are made of")

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n must be at least 1, not {self.n}")
        if self.penalty > 0:
            raise ValueError(f"penalty must be at most 0, not {self.penalty}")


@dataclass
class LengthConfig:
    """`{name: length, min: 50, max: 200}`: 1 within the bounds, falling to 0 over `slack` outside."""

    min: int = option(0, "shortest good length")
    max: int | None = option(None, "longest good length; null is no bound")
    slack: int = option(0, "units over which the reward falls to 0; 0: at once")
    unit: Unit = option("tokens", "what is counted")

    def __post_init__(self) -> None:
        if self.min < 0 or self.slack < 0:
            raise ValueError("min and slack must be at least 0")
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max must be at least min, {self.min}, not {self.max}")


@dataclass
class OverlongConfig:
    """`{name: soft_overlong, max_tokens: 1024, cache: 256}`: 0 up to max_tokens - cache, then down to -1 at max_tokens."""

    max_tokens: int | None = option(None, "the longest answer; default: the trainer's max_tokens")
    cache: int | None = option(None, "tokens before the limit over which the penalty grows; default: a fifth of max_tokens")
    unit: Unit = option("tokens", "what is counted")

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}")
        if self.cache is not None and self.cache < 1:
            raise ValueError(f"cache must be at least 1, not {self.cache}")
        if self.cache is not None and self.max_tokens is not None and self.cache > self.max_tokens:
            raise ValueError(f"cache must be at most max_tokens, {self.max_tokens}, not {self.cache}")


@dataclass
class CodeConfig:
    """`{name: code, timeout: 5}`: the share of the row's tests that the answer's Python passes."""

    tests: str | None = option(
        None, "the row's key with the tests; default: tests, test_list, verification_info, input_output, test"
    )
    partial: bool = option(True, "the share of tests passed; false: 1 for all of them, else 0")
    timeout: float = option(5.0, "seconds for one process")
    memory: int = option(1024, "MiB of address space of one process")
    workers: int = option(2, "processes at a time")
    network: Literal["auto", "deny", "allow"] = option(
        "auto", "auto cuts it off where `unshare` may; deny refuses to run where it may not; allow leaves it"
    )

    def __post_init__(self) -> None:
        if self.timeout <= 0:
            raise ValueError(f"timeout must be above 0 seconds, not {self.timeout}")
        for name, least in (("memory", 64), ("workers", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")


@dataclass
class ToolCallConfig:
    """`{name: tool_call}`: 1 where the answer makes the row's calls, in any order, and no other."""

    calls: str | None = option(None, "the row's key with the right calls; default: those of its last assistant message")
    partial: bool = option(True, "a part for a right name, and for each right argument; false: all or nothing")


@dataclass
class MetricConfig:
    """`{name: metric, metric: rouge_l}`, or `metric:rouge_l`."""

    metric: str = option("", "id of an installed part of kind metric")


@dataclass
class FunctionConfig:
    """`{name: function, file: mine.py, function: good}`, or `mine.py:good`."""

    file: str = option("", "a Python file")
    function: str = option("", "its function of completions and rows, which returns a number, or None, for each; may be async")


@dataclass
class ModelConfig:
    """`{name: model, folder: runs/reward}`, or the folder alone."""

    folder: str = option("", "a model trained with --trainer reward, or its like")


@dataclass
class JudgeConfig:
    """`{name: judge, address: 'http://HOST:PORT/v1'}`, or `judge:http://HOST:PORT/v1`."""

    address: str = option("", "an OpenAI-compatible address")
    model: str | None = option(None, "the judge's name at its server; default: the only one there")
    prompt: str | None = option(None, "a file with what it is asked: {question}, {reference} and {answer} may stand in it")
    max_tokens: int = option(512, "longest answer of the judge")

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}")
