"""The ways in which formats write a call's arguments: JSON, tags, Python, and Gemma's braces.

Each has `read`, which yields JSON text (piece by piece where the format's is JSON) and None where it needs more text.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from swift_plugin_transformers.answers.text import Malformed, Text

Pieces = Generator[str | None, None, None]
Asks = Generator[None, None, bool]
SCALAR = re.compile(r"[^,\]}\s]")
PYTHON = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}


def json_value(text: Text) -> Pieces:
    """One JSON value, as it comes. A control character inside a string is escaped, as models forget to. Raises Malformed."""
    first = yield from text.peek()
    if first not in '{["':
        whole = yield from text.word(SCALAR)
        yield whole
        _check(whole)
        return
    depth, inside, escaped, whole = 0, False, False, ""
    while True:
        if not (yield from text.need()):
            raise Malformed
        piece, done, at = [], False, 0
        for at, letter in enumerate(text.held, 1):  # noqa: B007 - `at` is where the value ends
            piece.append(json.dumps(letter)[1:-1] if inside and letter < " " else letter)
            if escaped:
                escaped = False
            elif inside and letter == "\\":
                escaped = True
            elif letter == '"':
                inside = not inside
            elif not inside:
                depth += (letter in "{[") - (letter in "}]")
            done = depth == 0 and not inside
            if done:
                break
        text.take(at)
        whole += "".join(piece)
        if done:
            _check(whole)
        yield "".join(piece)
        if done:
            return


def _check(whole: str) -> None:
    try:
        json.loads(whole, parse_constant=_no_number)
    except ValueError:
        raise Malformed from None


def _no_number(name: str) -> Any:
    raise ValueError(name)


def collected(text: Text) -> Generator[None, None, Any]:
    """One JSON value, parsed."""
    whole = ""
    for piece in json_value(text):
        if piece is None:
            yield None
        else:
            whole += piece
    return json.loads(whole)


@dataclass(frozen=True)
class JsonArguments:
    """`{"word": "tea"}`, or the same inside a string."""

    def begins(self, text: Text) -> Asks:
        """Whether arguments come next."""
        return (yield from text.peek()) in '{"'

    def read(self, text: Text, schema: dict[str, Any]) -> Pieces:
        first = yield from text.peek()
        if first == '"':
            value = yield from collected(text)
            yield _object(value)
        elif first != "{":
            raise Malformed
        else:
            yield from json_value(text)


def _object(value: str) -> str:
    try:
        found = json.loads(value) if value.strip() else {}
    except ValueError:
        raise Malformed from None
    if not isinstance(found, dict):
        raise Malformed
    return json.dumps(found, ensure_ascii=False)


@dataclass(frozen=True)
class TaggedArguments:
    """`<parameter=word>tea</parameter>`: a pair of tags for each argument; values have no quotes, so the schema tells types.

    The texts are as the template writes them: white space next to a value is not the value's.
    """

    opening: str  # before a key
    middle: str  # between key and value
    closing: str  # after a value
    between: str = ""  # white space between two arguments
    after: str = ""  # what follows the last one

    def begins(self, text: Text) -> Asks:
        words = [*self.opening.split()[:1], *self.after.split()[:1]]
        for word in words:
            if (yield from text.follows(word)):
                return True
        return False

    def read(self, text: Text, schema: dict[str, Any]) -> Pieces:
        found: dict[str, Any] = {}
        properties = schema.get("properties") or {}
        while (yield from text.passes(self.opening)):
            key = yield from text.until([self.middle.strip()], 1000)
            value = yield from text.until([self.closing.strip()])
            key = key.strip()
            found[key] = typed(self._bare(value), properties.get(key) or {})
        if self.after.strip() and not (yield from text.follows(self.after.split()[0])):
            raise Malformed
        yield json.dumps(found, ensure_ascii=False)

    def _bare(self, value: str) -> str:
        """A value without the line breaks that the tags bring along."""
        lead = self.middle[len(self.middle.rstrip()) :]
        trail = self.closing[: len(self.closing) - len(self.closing.lstrip())]
        return value.removeprefix(lead).removesuffix(trail)


def kinds(schema: Any) -> set[str]:
    """The JSON types that a schema allows; empty where it does not say."""
    if not isinstance(schema, dict):
        return set()
    if isinstance(own := schema.get("type"), str):
        return {own} | ({"null"} if schema.get("nullable") else set())
    if isinstance(own, list):
        return {kind for kind in own if isinstance(kind, str)}
    found = {kind for key in ("anyOf", "oneOf") for inner in schema.get(key) or () for kind in kinds(inner)}
    values = [*(schema.get("enum") or ()), *([schema["const"]] if "const" in schema else [])]
    return found | {kind_of(value) for value in values}


def kind_of(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    names = {str: "string", int: "integer", float: "number", list: "array", dict: "object"}
    return names.get(type(value), "string")


def typed(value: str, schema: Any) -> Any:
    """A value that was written without quotes, as the schema has it; the text itself where that allows no other."""
    allowed = kinds(schema)
    if not allowed or allowed == {"string"}:
        return value
    found = loose(value.strip())
    kind = kind_of(found)
    if kind == "number" and "integer" in allowed and found.is_integer():
        return int(found)
    if kind != "string" and (kind in allowed or (kind == "integer" and "number" in allowed)):
        return found
    return value if "string" in allowed or isinstance(found, str) else found


def loose(value: str) -> Any:
    """JSON, or a Python literal, or the text as it is."""
    for parse in (json.loads, python_literal):
        try:
            found = parse(value)
            json.dumps(found, allow_nan=False)
        except (ValueError, TypeError, RecursionError):
            continue
        return found
    return value


def python_literal(source: str) -> Any:
    """A Python literal; JSON's words for truth and nothing are known too. Raises ValueError."""
    try:
        return _plain(ast.parse(source.strip(), mode="eval").body)
    except (SyntaxError, MemoryError, RecursionError):
        raise ValueError("not a literal") from None


def _plain(node: ast.AST) -> Any:
    match node:
        case ast.Constant(value=str() | int() | float() | bool() | None as value):
            return value
        case ast.Name(id=name) if name in PYTHON:
            return PYTHON[name]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_plain(item) for item in items]
        case ast.Dict(keys=keys, values=values) if None not in keys:
            return {str(_plain(key)): _plain(value) for key, value in zip(keys, values, strict=True) if key is not None}
    raise ValueError("not a literal")


@dataclass(frozen=True)
class PythonArguments:
    """`(word="tea", n=2)`, to the closing parenthesis."""

    def begins(self, text: Text) -> Asks:
        return bool((yield from text.peek()) == "(")

    def read(self, text: Text, schema: dict[str, Any]) -> Pieces:
        if (yield from text.peek()) != "(":
            raise Malformed
        source = yield from balanced(text, "([{", ")]}", ("'", '"'))
        try:
            called = ast.parse(f"f{source}", mode="eval").body
            if not isinstance(called, ast.Call) or called.args or any(key.arg is None for key in called.keywords):
                raise Malformed
            found = {str(key.arg): _plain(key.value) for key in called.keywords}
            yield json.dumps(found, ensure_ascii=False, allow_nan=False)
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            raise Malformed from None


def balanced(text: Text, opens: str, closes: str, quotes: tuple[str, ...]) -> Generator[None, None, str]:
    """From an opening bracket to its closing one. What stands in quotes does not count; one quote may be several characters."""
    depth, at, quote, longest = 0, 0, "", max(map(len, quotes))
    while True:
        if len(text.held) < at + longest and not text.closed:
            yield None
            continue
        if at >= len(text.held):
            raise Malformed
        here = text.held[at]
        if quote:
            if here == "\\" and len(quote) == 1:
                at += 1
            elif text.held.startswith(quote, at):
                at, quote = at + len(quote) - 1, ""
        elif found := next((each for each in quotes if text.held.startswith(each, at)), ""):
            at, quote = at + len(found) - 1, found
        else:
            depth += (here in opens) - (here in closes)
            if depth == 0:
                return text.take(at + 1)
        at += 1


@dataclass(frozen=True)
class BracedArguments:
    """Gemma's `{word:<|"|>tea<|"|>,n:2}`: keys are bare, and a mark of its own quotes texts."""

    quote: str

    def begins(self, text: Text) -> Asks:
        return bool((yield from text.peek()) == "{")

    def read(self, text: Text, schema: dict[str, Any]) -> Pieces:
        if (yield from text.peek()) != "{":
            raise Malformed
        source = yield from balanced(text, "{[", "}]", (self.quote,))
        value, rest = self._value(source)
        if rest.strip() or not isinstance(value, dict):
            raise Malformed
        yield json.dumps(value, ensure_ascii=False)

    def _value(self, source: str) -> tuple[Any, str]:
        source = source.lstrip()
        if source.startswith(self.quote):
            said, found, rest = source[len(self.quote) :].partition(self.quote)
            if not found:
                raise Malformed
            return said, rest
        if source[:1] in ("{", "["):
            return self._items(source)
        end = next((at for at, letter in enumerate(source) if letter in ",]}"), len(source))
        value = loose(source[:end].strip())
        return value, source[end:]

    def _items(self, source: str) -> tuple[Any, str]:
        mapping, closing = source[0] == "{", "}" if source[0] == "{" else "]"
        named: dict[str, Any] = {}
        listed: list[Any] = []
        source = source[1:].lstrip()
        while not source.startswith(closing):
            if mapping:
                key, found, source = source.partition(":")
                if not found:
                    raise Malformed
                named[key.strip().removeprefix(self.quote).removesuffix(self.quote)], source = self._value(source)
            else:
                value, source = self._value(source)
                listed.append(value)
            source = source.lstrip()
            if source.startswith(","):
                source = source[1:].lstrip()
            elif not source.startswith(closing):
                raise Malformed
        return (named if mapping else listed), source[1:]


Arguments = JsonArguments | TaggedArguments | PythonArguments | BracedArguments
