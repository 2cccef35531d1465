"""A format of tool calls as a Lark grammar in llguidance's dialect: every sentence of it is read back as calls of the tools.

A mark that is one token of the tokenizer stands as that token; llguidance matches no special token by its text.
"""

from __future__ import annotations

import json
import re
from typing import Any

from swift_core.errors import RequestError

from swift_plugin_transformers.answers.arguments import (
    Arguments,
    BracedArguments,
    JsonArguments,
    PythonArguments,
    TaggedArguments,
    kinds,
)
from swift_plugin_transformers.answers.calls import HOLE, CallFormat, NamedCall
from swift_plugin_transformers.answers.harmony import Harmony
from swift_plugin_transformers.answers.reader import AnswerFormat

NAME = re.compile(r"[\w.\-]+")
ID = r"/[a-zA-Z0-9]{9}/"  # Mistral's: nine letters or digits


class Grammar:
    """Rules as they are written; texts become strings and tokens."""

    def __init__(self, tokenizer: Any) -> None:
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.tokens = {token.content: number for number, token in added.items() if token.content.strip()}
        longest = sorted(self.tokens, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest))) if longest else None
        self.rules: dict[str, str] = {}

    def rule(self, name: str, body: str) -> str:
        self.rules[name] = body
        return name.partition("[")[0]

    def text(self, said: str, hole: str = r"/[0-9]{1,3}/") -> str:
        """A constant text, with holes for numbers."""
        parts: list[str] = []
        for number, part in enumerate(said.split(HOLE)):
            parts += [hole] if number else []
            at = 0
            for found in self.pattern.finditer(part) if self.pattern else ():
                parts += [_quoted(part[at : found.start()])] if found.start() > at else []
                parts.append(f"<[{self.tokens[found.group()]}]>")
                at = found.end()
            parts += [_quoted(part[at:])] if at < len(part) else []
        return " ".join(parts)

    def until(self, name: str, end: str) -> str:
        """Any text to an end that is given, the end included."""
        if end in self.tokens:
            return self.rule(name, f"/(?s:.*)/ <[{self.tokens[end]}]>")
        return self.rule(f"{name}[suffix={_quoted(end)}]", "/(?s:.*)/")

    def __str__(self) -> str:
        return "\n".join(f"{name}: {body}" for name, body in self.rules.items()) + "\n"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def call_grammar(
    tokenizer: Any, form: AnswerFormat, tools: list[Any], name: str | None, many: bool, prompt: str | None = None
) -> str:
    """See `ChatTemplate.call_grammar`. prompt: the end of what is answered, which tells whether reasoning is under way."""
    functions = _functions(tools, name)
    grammar = Grammar(tokenizer)
    if isinstance(form.calls, Harmony):
        return _harmony(grammar, functions)
    calls = form.calls
    grammar.rule("start", "")
    named = [grammar.rule(f"call{number}", _call(grammar, calls, each, number)) for number, each in enumerate(functions)]
    grammar.rule("call", " | ".join(named))
    more = " ".join(filter(None, [grammar.text(calls.separator + calls.before), "call", grammar.text(calls.after)]))
    repeat = grammar.rule("more", more) + "*" if many and calls.many else ""
    first = calls.opening + calls.brackets[0] + calls.before[len(calls.prompted) :]
    body = [first.lstrip() and grammar.text(first.lstrip()), "call", grammar.text(calls.after), repeat]
    answer = " ".join(filter(None, [*body, grammar.text(calls.brackets[1] + calls.closing)]))
    lead = grammar.text(first[: len(first) - len(first.lstrip())])
    grammar.rules["start"] = f"{_thought(grammar, form, lead, prompt)} {answer}".strip()
    return str(grammar)


def _functions(tools: list[Any], name: str | None) -> list[dict[str, Any]]:
    found = []
    for number, tool in enumerate(tools or ()):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestError(
                f"tools.{number}: no function with a name; give OpenAI's form, {{type, function: {{name, ...}}}}"
            )
        if not NAME.fullmatch(function["name"]):
            raise RequestError(f"tools.{number}: {function['name']!r} is no name of a function: letters, digits, _ - . only")
        found.append(function)
    if not found:
        raise RequestError("a tool is to be called, and there are none")
    chosen = [each for each in found if name in (None, each["name"])]
    if not chosen:
        raise RequestError(f"no tool is named {name!r}; there are: {', '.join(each['name'] for each in found)}")
    return chosen


def _schema(function: dict[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments, which are always an object, and nothing that it does not name."""
    schema = dict(function.get("parameters") or {})
    schema.setdefault("type", "object")
    schema.setdefault("properties", {})
    schema.setdefault("additionalProperties", False)
    return schema


def _json(schema: Any) -> str:
    return f"%json {json.dumps(schema, ensure_ascii=False)}"


def _call(grammar: Grammar, calls: CallFormat, function: dict[str, Any], number: int) -> str:
    call, name = calls.call, function["name"]
    if isinstance(call, NamedCall):
        arguments = _arguments(grammar, call.syntax, function, f"args{number}", calls)
        return " ".join(filter(None, [grammar.text(name + call.middle), arguments]))
    arguments = grammar.rule(f"args{number}", _json(_schema(function)))
    return f"{grammar.text(call.head + name + call.middle)} {arguments} {grammar.text(call.tail, ID)}"


def _arguments(grammar: Grammar, syntax: Arguments, function: dict[str, Any], rule: str, calls: CallFormat) -> str:
    if isinstance(syntax, JsonArguments):
        return grammar.rule(rule, _json(_schema(function)))
    schema = _schema(function)
    fields, required = schema["properties"], set(schema.get("required") or ())
    if isinstance(syntax, TaggedArguments):
        parts: list[str] = []
        for number, (key, inner) in enumerate(fields.items()):
            opening = syntax.between + syntax.opening if number else syntax.opening
            body = f"{grammar.text(opening + key + syntax.middle)} {_tagged(grammar, syntax, inner, f'{rule}_{number}')}"
            field = grammar.rule(f"{rule}_field{number}", body)
            parts.append(field if key in required else f"{field}?")
        return grammar.rule(rule, " ".join(parts)) if parts else ""
    python = isinstance(syntax, PythonArguments)
    named = [
        (key in required, grammar.rule(f"{rule}_field{number}", _field(grammar, syntax, key, inner, f"{rule}_{number}")))
        for number, (key, inner) in enumerate(fields.items())
    ]
    comma = '", "' if python else '","'
    inside = _sequence(grammar, named, comma, rule)
    opening, closing = ('"("', '")"') if python else ('"{"', '"}"')
    return grammar.rule(rule, f"{opening} {inside} {closing}" if inside else f"{opening} {closing}")


def _sequence(grammar: Grammar, fields: list[tuple[bool, str]], comma: str, rule: str) -> str:
    """Fields in their order, those that are required always, with commas between."""
    if not fields:
        return ""
    tails: list[str] = [""] * (len(fields) + 1)  # what may follow field n - 1
    for number in range(len(fields) - 1, -1, -1):
        needed, field = fields[number]
        rest = f" {tails[number + 1]}" if tails[number + 1] else ""
        here = f"{comma} {field}{rest}"
        if needed:
            body = here
        else:
            body = f"({here}) | {tails[number + 1]}" if rest else f"({here})?"
        tails[number] = grammar.rule(f"{rule}_tail{number}", body)
    starts, empty = [], True
    for number, (needed, field) in enumerate(fields):
        starts.append(f"{field} {tails[number + 1]}".strip())
        if needed:
            empty = False
            break
    return grammar.rule(f"{rule}_fields", " | ".join(starts)) + ("?" if empty else "")


def _tagged(grammar: Grammar, syntax: TaggedArguments, schema: Any, rule: str) -> str:
    """A value without quotes, and what closes it."""
    allowed = kinds(schema) or {"string"}
    closing = grammar.text(syntax.closing)
    values = schema.get("enum") if isinstance(schema, dict) else None
    if values:
        body = " | ".join(grammar.text(each if isinstance(each, str) else json.dumps(each)) for each in values)
        return f"{grammar.rule(rule, body)} {closing}"
    if "string" in allowed:
        core = syntax.closing.strip()
        if core in grammar.tokens or core != syntax.closing:
            lead = syntax.closing[: len(syntax.closing) - len(syntax.closing.lstrip())]
            if core in grammar.tokens:
                return grammar.rule(rule, f"/(?s:.*)/ {grammar.text(lead + core)}")
        return grammar.until(rule, syntax.closing)
    other = []
    if "boolean" in allowed:
        other.append('"true" | "false" | "True" | "False"')
        allowed = allowed - {"boolean"}
    if allowed:
        other.append(grammar.rule(f"{rule}_json", _json(schema)))
    return f"{grammar.rule(rule, ' | '.join(other))} {closing}"


def _field(grammar: Grammar, syntax: Arguments, key: str, schema: Any, rule: str) -> str:
    """An argument in Python's syntax, or in Gemma's."""
    if isinstance(syntax, BracedArguments):
        return f"{grammar.text(key + ':')} {_braced(grammar, syntax, schema, rule)}"
    if kinds(schema) == {"boolean"}:
        return f'{grammar.text(key + "=")} ("True" | "False")'
    return f"{grammar.text(key + '=')} {grammar.rule(rule, _json(schema))}"


def _braced(grammar: Grammar, syntax: BracedArguments, schema: Any, rule: str) -> str:
    """A value in Gemma's syntax. Inside arrays and objects that name nothing, any value may stand."""
    schema = schema if isinstance(schema, dict) else {}
    allowed, quote = kinds(schema), grammar.text(syntax.quote)
    if schema.get("enum"):
        values = [
            f"{quote} {grammar.text(v)} {quote}" if isinstance(v, str) else grammar.text(json.dumps(v)) for v in schema["enum"]
        ]
        return grammar.rule(rule, " | ".join(values))
    parts = []
    if "string" in allowed or not allowed:
        said = f"{quote} {grammar.until(f'{rule}_text', syntax.quote)}"
        parts.append(said)
    scalars = allowed & {"integer", "number", "boolean", "null"}
    if scalars:
        parts.append(grammar.rule(f"{rule}_json", _json({**schema, "type": sorted(scalars)})))
    if "array" in allowed:
        item = _braced(grammar, syntax, schema.get("items") or {}, f"{rule}_item")
        parts.append(f'"[" ({item} ("," {item})*)? "]"')
    if "object" in allowed:
        inner, required = schema.get("properties") or {}, set(schema.get("required") or ())
        named = [
            (
                key in required,
                grammar.rule(f"{rule}_field{n}", f"{grammar.text(key + ':')} {_braced(grammar, syntax, v, f'{rule}_{n}')}"),
            )
            for n, (key, v) in enumerate(inner.items())
        ]
        parts.append(f'"{{" {_sequence(grammar, named, chr(34) + "," + chr(34), rule)} "}}"')
    return grammar.rule(rule, " | ".join(parts))


def _thought(grammar: Grammar, form: AnswerFormat, lead: str, prompt: str | None) -> str:
    """Reasoning before a call: the model may reason, as it may without a constraint, and must end what the prompt begins.
    `lead` stands there where it does not reason."""
    end = (prompt or "").rstrip()
    if not form.opening or (form.closing and end.endswith(form.closing)):
        return lead
    parts = [grammar.until("thought", form.closing), grammar.text(form.gap)]
    if end.endswith(form.opening) if prompt is not None else form.open_prompt:
        return " ".join(filter(None, parts))
    thought = " ".join(filter(None, [f"({lead})?" if lead else "", grammar.text(form.opening), *parts]))
    return f"({thought} | {lead})" if lead else f"({thought})?"


def _harmony(grammar: Grammar, functions: list[dict[str, Any]]) -> str:
    """One call, after reasoning or without; the prompt ends with `<|start|>assistant`."""
    grammar.rule("start", "")
    calls = []
    for number, function in enumerate(functions):
        arguments = grammar.rule(f"args{number}", _json(_schema(function)))
        head = grammar.text(f" to=functions.{function['name']}<|channel|>commentary json<|message|>")
        calls.append(grammar.rule(f"call{number}", f"{head} {arguments} {grammar.text('<|call|>')}"))
    end = grammar.until("thought", "<|end|>")
    thought = f"{grammar.text('<|channel|>analysis<|message|>')} {end} {grammar.text('<|start|>assistant')}"
    grammar.rules["start"] = f"({thought})? call"
    grammar.rule("call", " | ".join(calls))
    return str(grammar)
