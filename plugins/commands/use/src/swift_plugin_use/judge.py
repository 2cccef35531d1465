"""A judge as a reward: a model behind an OpenAI-compatible address that rates an answer in words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from swift_core.errors import RequestError
from swift_core.types import Request, Row

from swift_plugin_use.answers import completions, split_reference

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

    def __init__(self, engine: Any, prompt: str, name: str, max_tokens: int = 512) -> None:
        self.engine, self.prompt, self.name, self.max_tokens = engine, prompt, name, max_tokens

    def __call__(self, completions_: list[str], rows: list[Row]) -> list[float]:
        """Raises ValueError where a rating cannot be had."""
        asked = [self._request(said, row) for said, row in zip(completions_, rows, strict=True)]
        return [self._rating(found) for found in completions(self.engine, asked)]

    def _request(self, said: str, row: Row) -> Request:
        messages, reference = split_reference(row)
        question = _words(messages[-1].get("content")) if len(messages) == 1 else "\n\n".join(
            f"{message['role']}: {_words(message.get('content'))}" for message in messages
        )  # fmt: skip
        parts = {"{question}": question, "{reference}": reference or "(none)", "{answer}": said}
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
    """The prompt of `--judge-prompt FILE`. Raises RequestError for one that shows the judge no answer."""
    if file is None:
        return PROMPT
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise RequestError(f"--judge-prompt {file}: cannot be read: {err}") from None
    if "{answer}" not in text:
        raise RequestError(
            f"--judge-prompt {file}: nowhere says {{answer}}; {{question}} and {{reference}} may stand there too"
        )
    return text
