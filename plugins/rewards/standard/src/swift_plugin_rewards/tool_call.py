"""The reward `tool_call`: the calls of an answer against those of the row."""

from __future__ import annotations

import json
import re
from typing import Any

from swift_core.types import Row

from swift_plugin_rewards.answer import raw_of
from swift_plugin_rewards.config import ToolCallConfig

MARKED = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)
Call = tuple[str, Any]
"""A function's name, and its arguments: an object, or None where they are no JSON object."""


class ToolCall:
    """None for a row that has neither tools nor right calls. A row with tools whose right answer calls none wants none."""

    def __init__(self, config: ToolCallConfig) -> None:
        self.config = config

    def __call__(self, completions: list[str], rows: list[Row]) -> list[float | None]:
        results: list[float | None] = []
        for said, row in zip(completions, rows, strict=True):
            right = expected(row, self.config.calls)
            results.append(None if right is None else alike(made(said), right, self.config.partial))
        return results


def expected(row: Row, key: str | None = None) -> list[Call] | None:
    """The row's right calls, or None where it says nothing of them. Raises ValueError for calls that cannot be read."""
    if key is not None or row.get("tool_calls") is not None:
        value = row.get(key or "tool_calls")
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError as err:
                raise ValueError(f"reward tool_call: the row's {key or 'tool_calls'!r} is no JSON: {err}") from None
        if value is None:
            return None
        return _read(value)
    messages = row.get("messages") or []
    if not messages or messages[-1].get("role") != "assistant":
        return None
    calls = messages[-1].get("tool_calls") or []
    return _read(calls) if calls or row.get("tools") else None


def made(said: str) -> list[Call]:
    """The calls of an answer: as the template read them, else from `<tool_call>` marks, else of an answer that is JSON."""
    message = getattr(said, "message", None) or {}
    if message.get("tool_calls"):
        return _read(message["tool_calls"])
    text = raw_of(said).rpartition("</think>")[2]
    calls: list[Call] = []
    for body in MARKED.findall(text) or [text]:
        try:
            value = json.loads(body)
        except ValueError:
            continue
        try:
            calls += _read(value)
        except ValueError:
            continue
    return calls


def _read(value: Any) -> list[Call]:
    found: list[Call] = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"reward tool_call: not a call, with a name and arguments: {json.dumps(call, default=str)[:80]}")
        arguments = function.get("arguments", function.get("parameters", {}))
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                arguments = None
        found.append((function["name"], arguments if isinstance(arguments, dict) else None))
    return found


def alike(said: list[Call], right: list[Call], partial: bool) -> float:
    """1 where both are the same calls in any order. With `partial` the mean over the larger number of calls of what each right
    one's best fit is worth: half for the name, half for the share of the arguments that agree."""
    if not said and not right:
        return 1.0
    left, total = list(said), 0.0
    for call in sorted(right, key=lambda call: -max((worth(each, call) for each in said), default=0.0)):
        best = max(left, key=lambda each: worth(each, call), default=None)
        if best is not None and worth(best, call) > 0:
            total += worth(best, call)
            left.remove(best)
    share = total / max(len(said), len(right))
    return share if partial else float(share == 1.0)


def worth(said: Call, right: Call) -> float:
    if said[0] != right[0]:
        return 0.0
    mine, theirs = said[1], right[1] or {}
    if mine is None:
        return 0.5
    names = mine.keys() | theirs.keys()
    same = sum(1 for name in names if name in mine and name in theirs and _equal(mine[name], theirs[name]))
    return 0.5 + 0.5 * (same / len(names) if names else 1.0)


def _equal(a: Any, b: Any) -> bool:
    """As JSON values: 1 is 1.0, and true is not 1."""
    return (isinstance(a, bool) == isinstance(b, bool)) and bool(a == b)
