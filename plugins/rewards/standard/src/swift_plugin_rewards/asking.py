"""Rows and engines: the answer that a row holds, and completions of which each may fail alone."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from swift_core.errors import RequestError
from swift_core.types import Completion, Engine, Request, Row

FIELDS = ("solution", "answer", "label")
"""Keys of a row that may hold the right answer beside a conversation."""


def split_reference(row: Row) -> tuple[list[Row], str | None]:
    """The messages to answer, and the answer that the row already holds, if its last message is one."""
    messages = row["messages"]
    if messages and messages[-1]["role"] == "assistant":
        content = messages[-1].get("content")
        if isinstance(content, list) and all(part.get("type") == "text" for part in content):
            content = "".join(part["text"] for part in content)
        return messages[:-1], content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return messages, None


def reference_of(row: Row, key: str | None = None) -> str | None:
    """The right answer to a row: of `key`, else of `solution`, `answer`, `label`, else its last assistant message."""
    for name in (key,) if key else FIELDS:
        value: Any = row.get(name)
        if isinstance(value, (str, int, float)) and not isinstance(value, bool) and str(value).strip():
            return str(value)
    return None if key else split_reference(row)[1] if row.get("messages") else None


def completions(engine: Engine, requests: list[Request]) -> list[Completion | str]:
    """A completion for each request, or why there is none: where one of them fails, they are asked one by one."""
    results: list[Completion | str] = ["the engine gave no answer"] * len(requests)
    try:
        for completion in engine.generate(requests) if requests else ():
            results[completion.index] = completion
    except (ValueError, RequestError):
        for index, request in enumerate(requests):
            try:
                for completion in engine.generate([request]):
                    results[index] = replace(completion, index=index)
            except (ValueError, RequestError) as err:
                results[index] = str(err)
    return results
