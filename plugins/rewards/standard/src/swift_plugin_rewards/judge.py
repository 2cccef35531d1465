"""A judge as a reward: a model behind an OpenAI-compatible address that rates an answer in words."""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from swift_core.config import Component, RunConfig
from swift_core.errors import RequestError, SwiftError
from swift_core.events import EventSink
from swift_core.session import Session
from swift_core.types import Request, Row

from swift_plugin_rewards.asking import completions, reference_of, split_reference

PROMPT = """Rate how well the answer serves the question, from 1 (useless) to 10 (perfect). Give your reasons in one or two \
sentences, then end with a line "Rating: N".

[Question]
{question}

[Reference answer, where there is one]
{reference}

[Answer to rate]
{answer}
"""
RATING = re.compile(r"(?:rating|score)\W{0,8}(-?\d+(?:\.\d+)?)", re.IGNORECASE)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


class Judge:
    """Asks for a rating of each answer; an answer without a number is an error of its row."""

    waits = True

    def __init__(self, engine: Any, prompt: str, name: str, max_tokens: int = 512) -> None:
        self.engine, self.prompt, self.name, self.max_tokens, self._stack = engine, prompt, name, max_tokens, ExitStack()

    @classmethod
    def open(cls, address: str, model: str | None, prompt: str | None, max_tokens: int, config: RunConfig) -> Judge:
        """The judge at an address. prompt: a file. Raises RequestError where nothing answers there."""
        asked, stack = read_prompt(prompt), ExitStack()
        engine = Component("openai", options={"model": model} if model else {})
        config = replace(config, model=Component(address), engine=engine, dataset=[])
        try:
            opened = stack.enter_context(Session(config, EventSink())).opened()
        except SwiftError as err:
            stack.close()
            raise type(err)(f"reward judge:{address}: {err}") from None
        judge = cls(opened.engine, asked, address, max_tokens)
        judge._stack = stack
        return judge

    def close(self) -> None:
        self._stack.close()

    def __call__(self, completions_: list[str], rows: list[Row]) -> list[float]:
        """Raises ValueError where a rating cannot be had."""
        asked = [self._request(said, row) for said, row in zip(completions_, rows, strict=True)]
        return [self._rating(found) for found in completions(self.engine, asked)]

    def _request(self, said: str, row: Row) -> Request:
        messages, reference = split_reference(row)
        reference = reference_of(row) if reference is None else reference
        question = _words(messages[-1].get("content")) if len(messages) == 1 else "\n\n".join(
            f"{message['role']}: {_words(message.get('content'))}" for message in messages
        )  # fmt: skip
        parts = {"{question}": question, "{reference}": reference or "(none)", "{answer}": str(said)}
        text = re.sub("|".join(map(re.escape, parts)), lambda found: parts[found.group()], self.prompt)
        return Request(messages=[{"role": "user", "content": text}], max_tokens=self.max_tokens)

    def _rating(self, found: Any) -> float:
        if isinstance(found, str):
            raise ValueError(f"the judge {self.name} did not answer: {found}")
        rated = RATING.findall(found.text) or NUMBER.findall(found.text)
        if not rated:
            raise ValueError(f"the judge {self.name} gave no number: {found.text.strip()[-80:]!r}")
        return float(rated[-1])


def _words(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part.get("text", f"<{part.get('type')}>") for part in content)
    return content or ""


def read_prompt(file: str | None) -> str:
    """The prompt of a file. Raises RequestError for one that shows the judge no answer."""
    if file is None:
        return PROMPT
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise RequestError(f"judge prompt {file}: cannot be read: {err}") from None
    if "{answer}" not in text:
        raise RequestError(f"judge prompt {file}: nowhere says {{answer}}; {{question}} and {{reference}} may stand there too")
    return text
