"""From a row to what is asked of the model and what its answer is held against.

A row's reference is its final assistant message, else its field `label`, `solution` or `answer`.
"""

from __future__ import annotations

import re
from typing import Any

from swift_core.source import asked_media
from swift_core.types import Request, Row

FIELDS = ("label", "solution", "answer")
_TRAINING = ("train", "weight")  # keys of a message that only training reads


class Unusable(ValueError):
    """The row cannot be scored; the message is the reason, the same for all rows with that fault."""


def read_row(row: Row, max_tokens: int) -> tuple[Request, list[str]]:
    """The greedy request of a row, and its references: one, or several of which the best counts. Raises Unusable."""
    messages = row.get("messages") or []
    if not messages:
        raise Unusable("the row has no messages")
    if messages[-1].get("role") == "assistant":
        prompt, references = messages[:-1], [text_of(messages[-1])]
        if not references[0].strip():
            called = messages[-1].get("tool_calls")
            raise Unusable("the final assistant message " + ("calls tools and holds no text" if called else "is empty"))
    else:
        prompt, references = messages, _field(row)
    if not prompt:
        raise Unusable("nothing stands before the answer that could be asked")
    media = asked_media(row, len(prompt))
    asked = [{key: value for key, value in message.items() if key not in _TRAINING} for message in prompt]
    kwargs = row.get("chat_template_kwargs") or {}
    request = Request(asked, row.get("tools"), max_tokens=max_tokens, template_kwargs=dict(kwargs), media=media)
    return request, references


def _field(row: Row) -> list[str]:
    for name in FIELDS:
        value = row.get(name)
        texts = value if isinstance(value, list) else [value]
        if value is None or not texts:
            continue
        if not all(isinstance(text, (str, int, float)) for text in texts):
            raise Unusable(f"the field {name!r} is neither text nor a number, nor a list of them")
        if not all(str(text).strip() for text in texts):
            raise Unusable(f"the field {name!r} is empty")
        return [str(text) for text in texts]
    raise Unusable(f"no reference: the last message is not the assistant's, and there is no {', '.join(FIELDS)}")


def text_of(message: Row) -> str:
    """A message's text; of content in parts, the text parts in a row."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict) and part.get("type") == "text")
    return str(content or "")


def extract_answer(pattern: re.Pattern[str] | None, text: str) -> str | None:
    """The answer within a text: of the pattern's last match that is not empty, the last group that closed, else the match.

    None where the pattern matches nothing; the text itself where there is no pattern.
    """
    if pattern is None:
        return text
    found: list[Any] = [match[match.lastindex or 0] for match in pattern.finditer(text)]
    return next((answer for answer in reversed(found) if answer.strip()), None)
