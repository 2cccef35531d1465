"""An assistant message put together from the deltas of an answer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from uuid import uuid4

from swift_core.types import AnswerDelta, Row


def message_of(deltas: Iterable[AnswerDelta]) -> Row:
    """`{"role": "assistant", "content"}`, with `reasoning_content` and `tool_calls` where there are any.

    Arguments are JSON text. A call whose arguments are not whole is left out: its text is content already. Content is None
    where there are only calls.
    """
    content, reasoning = "", ""
    calls: dict[int, tuple[str, str]] = {}
    for delta in deltas:
        content, reasoning = content + delta.content, reasoning + delta.reasoning
        if delta.call is not None:
            name, arguments = calls.get(delta.call, ("", ""))
            calls[delta.call] = name + delta.name, arguments + delta.arguments
    whole = [
        {"id": f"call_{uuid4().hex[:24]}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for name, arguments in calls.values()
        if _whole(arguments)
    ]
    message: Row = {"role": "assistant", "content": content or (None if whole else "")}
    if reasoning:
        message["reasoning_content"] = reasoning
    if whole:
        message["tool_calls"] = whole
    return message


def _whole(arguments: str) -> bool:
    try:
        return isinstance(json.loads(arguments), dict)
    except ValueError:
        return False
