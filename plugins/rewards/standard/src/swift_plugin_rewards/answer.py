"""What a reward is given: an answer's text, and beside it what some rewards need to know of it.

A reward that only reads text takes any string. `Answer` is one, so that a user's function need not know it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from swift_core.answers import message_of
from swift_core.types import Completion, Row


class Answer(str):
    """`text` is what the user reads; reasoning that the template marks is in `raw` only.

    raw: the text as it was generated. token_ids: as generated, or None where they are not known. finish: "stop" or "length".
    message: the answer as a message, with `tool_calls` and `reasoning_content` apart; None where nobody read it.
    """

    raw: str
    token_ids: Sequence[int] | None
    finish: str | None
    message: Row | None

    def __new__(
        cls, text: str, raw: str | None = None, token_ids: Sequence[int] | None = None, finish: str | None = None,
        message: Row | None = None,
    ) -> Answer:  # fmt: skip
        made = super().__new__(cls, text)
        made.raw, made.token_ids, made.finish, made.message = text if raw is None else raw, token_ids, finish, message
        return made


def answer_of(
    completion: Completion, template: Any = None, prompt: Sequence[int] = (), tools: list[Any] | None = None
) -> Answer:
    """A completion as an answer. With a template that has a reader, reasoning and tool calls are taken apart.

    prompt: the token ids that were answered.
    """
    message = completion.message
    if message is None and completion.token_ids and hasattr(template, "reader"):
        reader = template.reader(list(prompt), tools)
        message = message_of([*reader.feed(completion.token_ids), *reader.close()])
    text = completion.text if message is None else message.get("content") or ""
    if message is not None and not text and not message.get("tool_calls"):
        text = completion.text  # all of it is reasoning that never ended
    return Answer(text, completion.text, completion.token_ids or None, completion.finish, message)


def raw_of(answer: str) -> str:
    return getattr(answer, "raw", answer)
