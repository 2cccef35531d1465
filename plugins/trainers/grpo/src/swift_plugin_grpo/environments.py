"""Environments of rollouts with several turns: who answers the model, and how a talk goes on without tokenizing anything twice.

The Protocol is Gymnasium's, with messages for observations. It is named as FILE.py:CLASS, or as a part `environment`; each
rollout gets one of its own.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from swift_core.errors import RequestError, RunError, one_line
from swift_core.types import Row, Template


@runtime_checkable
class Environment(Protocol):
    """What a rollout talks to."""

    def reset(self, row: Row) -> list[Row] | None:
        """Begin with a row. Messages that stand after the row's prompt, if any."""

    def step(self, message: Row) -> tuple[list[Row], float, bool]:
        """The model's answer, `{"role": "assistant", "content": ..., "tool_calls"?: [...]}`: what is said to it, the reward of
        this turn, and whether the talk is over."""


Factory = Callable[[], Environment]


def make_factory(spec: str, part: Callable[..., Any], options: dict[str, Any]) -> Factory:
    """How environments are made: `FILE.py:CLASS`, else the id of a part. Raises RequestError for what is not there."""
    if ".py:" in spec:
        made: Factory = load_object(spec, "trainer.environment")
        return (lambda: made(**options)) if options else made
    found: Factory = part("environment", spec, **options)
    return found


def load_object(spec: str, address: str) -> Any:
    """The object `NAME` of `FILE.py:NAME`. Raises RequestError."""
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise RequestError(f"{address}: {file}: no such file")
    key = f"swift_file_{abs(hash(path.resolve()))}"
    if key not in sys.modules:
        described = importlib.util.spec_from_file_location(key, path)
        assert described is not None
        assert described.loader is not None
        module = importlib.util.module_from_spec(described)
        sys.modules[key] = module
        try:
            described.loader.exec_module(module)
        except Exception as err:
            del sys.modules[key]
            raise RequestError(f"{address}: {file} cannot be imported: {one_line(err)}") from err
    if (found := getattr(sys.modules[key], name, None)) is None:
        raise RequestError(f"{address}: {file} has no {name!r}")
    return found


class ToolEnvironment:
    """Part `environment/tools`: calls the functions that the model asks for; over when it asks for none.

    A function that fails, or that is not there, answers with its error: models are to learn from it.
    """

    def __init__(self, functions: dict[str, Callable[..., Any]]) -> None:
        self.functions = functions

    def reset(self, row: Row) -> None:
        return None

    def step(self, message: Row) -> tuple[list[Row], float, bool]:
        calls = message.get("tool_calls") or []
        return [self._answer(call) for call in calls], 0.0, not calls

    def _answer(self, call: dict[str, Any]) -> Row:
        asked = call.get("function") or {}
        name, arguments = str(asked.get("name")), asked.get("arguments") or {}
        said: dict[str, Any] = {"role": "tool", "name": name}
        if call.get("id"):
            said["tool_call_id"] = call["id"]
        function = self.functions.get(name)
        if function is None:
            return {**said, "content": f"error: no tool {name!r}; there are: {', '.join(sorted(self.functions)) or 'none'}"}
        try:
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            result = function(**arguments)
        except Exception as err:
            return {**said, "content": f"error: {one_line(err)}"}
        return {**said, "content": result if isinstance(result, str) else json.dumps(result, default=str)}


def tool_factory(functions: Sequence[str]) -> Factory:
    """Environments with the functions `FILE.py:NAME`. Raises RequestError for one that is not there."""
    if not functions:
        raise RequestError("environment tools: functions is missing: [FILE.py:NAME, ...]")
    loaded = [load_object(spec, "environment tools.functions") for spec in functions]
    table = {spec.rpartition(":")[2]: function for spec, function in zip(functions, loaded, strict=True)}
    return lambda: ToolEnvironment(table)


def read_answer(template: Template, prompt: Sequence[int], ids: Sequence[int], text: str, tools: list[Any] | None) -> Row:
    """An answer as a message, with its tool calls and its reasoning apart where the template can read them."""
    make = getattr(template, "reader", None)
    if make is None:
        return {"role": "assistant", "content": text}
    reader = make(list(prompt), tools)
    content, reasoning, calls = "", "", dict[int, dict[str, str]]()
    for delta in [*reader.feed(ids), *reader.close()]:
        content += delta.content
        reasoning += delta.reasoning
        if delta.call is not None:
            call = calls.setdefault(delta.call, {"name": "", "arguments": ""})
            call["name"] += delta.name
            call["arguments"] += delta.arguments
    message: Row = {"role": "assistant", "content": content}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [_call(n, call) for n, call in sorted(calls.items())]
    return message


def _call(number: int, call: dict[str, str]) -> dict[str, Any]:
    try:
        arguments: Any = json.loads(call["arguments"] or "{}")
    except ValueError:
        arguments = call["arguments"]
    return {"id": f"call_{number}", "type": "function", "function": {"name": call["name"], "arguments": arguments}}


def continuation(
    template: Template, answer: Row, said: Sequence[Row], tools: list[Any] | None, ended: bool, kwargs: dict[str, Any]
) -> list[int]:
    """Token ids that stand between an answer's own and the next one's: the rest of the turn's end, the messages `said`, and the
    generation prompt. ended: whether the answer's ids hold the token that ends a turn; else it is added.

    Found on a stand-in for the talk so far, so that no token of it is made again. Raises RunError for a template that writes a
    turn's end otherwise.
    """
    calls = {"tool_calls": answer["tool_calls"]} if answer.get("tool_calls") else {}
    talk: list[Row] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **calls}]
    other = [{**message, "content": f"x{message.get('content')}"} for message in said] or [{"role": "user", "content": "x"}]
    whole = template.prompt([*talk, *said], tools, **kwargs)
    alike = _alike(whole, template.prompt([*talk, *other], tools, **kwargs))
    stops = set(template.stop_ids())
    ends = [n for n in range(alike) if whole[n] in stops]
    if not ends:
        raise RunError("the template ends an answer with no token of its own: a rollout of several turns cannot go on from it")
    # Several calls may end in the same token: the answer's end is the last one before what is said.
    return whole[ends[-1] + ended :]


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
