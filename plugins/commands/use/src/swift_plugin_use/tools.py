"""Tools of a conversation: Python functions of a file, which can be run, or JSON, whose results are typed in."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from swift_core.errors import RequestError, one_line
from swift_core.types import Row

PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}
ARGUMENT = re.compile(r"^\s*(?::param\s+)?(\w+)\s*(?:\([^)]*\))?\s*:\s*(\S.*)$")


@dataclass(frozen=True)
class Tools:
    """What the model is told, and what can be run of it, by name."""

    listed: list[Row] = field(default_factory=list)
    functions: dict[str, Callable[..., Any]] = field(default_factory=dict)
    ask: bool = True  # before a function runs

    def result(self, call: Row) -> Row:
        """The message with a call's result: of its function, once that is allowed, else what is typed in."""
        name, written = call["function"]["name"], call["function"].get("arguments") or "{}"
        function = self.functions.get(name)
        if function is None:
            known = any(tool["function"]["name"] == name for tool in self.listed)
            said = _typed(f"result of {name}> ") if known else f"there is no tool {name}"
        elif self.ask and _typed(f"run {name}? [y/n] ").strip().lower() not in ("y", "yes"):
            said = "the user did not allow this call"
        else:
            said = _run(function, written)
        click.echo(f"<- {said}")
        return {"role": "tool", "name": name, "tool_call_id": call.get("id", ""), "content": said}


def _typed(prompt: str) -> str:
    try:
        return input(prompt if sys.stdin.isatty() else "")
    except EOFError:
        return ""


def _run(function: Callable[..., Any], written: str) -> str:
    """What a function returns, as text. What it raises is the result too: the model may do better."""
    try:
        arguments = json.loads(written) if isinstance(written, str) else written
        found = function(**arguments)
        return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False, default=str)
    except Exception as err:
        return f"error: {one_line(err)}"


def read_tools(file: str | None, auto: bool) -> Tools:
    """The tools of `--tools FILE`. Raises RequestError for a file that has none."""
    if file is None:
        return Tools()
    path = Path(file).expanduser()
    if not path.is_file():
        raise RequestError(f"--tools {file}: no such file")
    if path.suffix == ".py":
        functions = {
            name: found for name, found in vars(load_module(path, "--tools")).items()
            if inspect.isfunction(found) and found.__module__ == module_name(path) and not name.startswith("_")
        }  # fmt: skip
        if not functions:
            raise RequestError(f"--tools {file}: no function is defined in it; names that begin with _ do not count")
        return Tools([describe(function, file) for function in functions.values()], functions, not auto)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise RequestError(f"--tools {file}: neither Python (.py) nor JSON: {one_line(err)}") from None
    listed = [tool if "function" in tool else {"type": "function", "function": tool} for tool in _listed(found, file)]
    return Tools(listed)


def _listed(found: Any, file: str) -> list[Any]:
    found = found if isinstance(found, list) else [found]
    for number, tool in enumerate(found):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestError(f"--tools {file}: entry {number} has no name; expected OpenAI's form of a tool")
    if not found:
        raise RequestError(f"--tools {file}: the list is empty")
    return found


def module_name(path: Path) -> str:
    return f"swift_plugin_use_file_{path.stem}"


def load_module(path: Path, option: str) -> types.ModuleType:
    """A Python file as a module. Raises RequestError where it does not load."""
    spec = importlib.util.spec_from_file_location(module_name(path), path)
    if spec is None or spec.loader is None:
        raise RequestError(f"{option} {path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as err:
        raise RequestError(f"{option} {path}: {one_line(err)}") from None
    return module


def describe(function: Callable[..., Any], file: str) -> Row:
    """A function in OpenAI's form of a tool: types from its annotations, texts from its docstring."""
    try:
        hints = typing.get_type_hints(function)
    except Exception as err:
        raise RequestError(f"--tools {file}: {function.__name__}: {one_line(err)}") from None
    summary, told = _docstring(function)
    properties: dict[str, Any] = {}
    required = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise RequestError(f"--tools {file}: {function.__name__}: parameter {name} cannot be given by name")
        properties[name] = _schema(hints.get(name)) | ({"description": told[name]} if name in told else {})
        if parameter.default is parameter.empty:
            required.append(name)
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": function.__name__, "description": summary, "parameters": parameters}}


def _docstring(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """The text before the parameters, and each parameter's line."""
    lines = (inspect.getdoc(function) or function.__name__).splitlines()
    names = set(inspect.signature(function).parameters)
    told = {found[1]: found[2] for line in lines if (found := ARGUMENT.match(line)) and found[1] in names}
    first = next((n for n, line in enumerate(lines) if (found := ARGUMENT.match(line)) and found[1] in names), len(lines))
    head = [line for line in lines[:first] if line.strip().rstrip(":").lower() not in ("args", "arguments", "parameters")]
    return " ".join(" ".join(head).split()), told


def _schema(hint: Any) -> dict[str, Any]:
    """A type's JSON schema; of one that JSON has no word for, any value."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        schemas = [_schema(each) for each in inner if each is not type(None)]
        return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    if origin is typing.Literal:
        return {"enum": list(inner)}
    if origin in (list, tuple, set):
        return {"type": "array"} | ({"items": _schema(inner[0])} if inner else {})
    kind = PLAIN.get(origin or hint)
    return {"type": kind} if kind else {}
