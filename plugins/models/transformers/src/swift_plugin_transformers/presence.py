"""Whether a rendered turn holds all that the assistant says: its text, its reasoning, its tool calls.

Two ways. The plain one looks for the words, spacing aside, inside the turn's own part. The sure one renders the turn again
with every saying replaced by a word that occurs nowhere else, and looks for those; it also tells where the sayings begin and
end, whatever a template writes around them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from swift_core.types import Row

REASONING = ("reasoning_content", "thinking", "reasoning")  # the names under which transformers knows it
SPACE = re.compile(r"\s+")


def texts(message: Row) -> list[str]:
    """The message's own text, part by part."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return [content] if content.strip() else []
    found = [part if isinstance(part, str) else part.get("text") or "" for part in content]
    return [text for text in found if isinstance(text, str) and text.strip()]


def reasoning(message: Row) -> str:
    """The message's reasoning, from a key of its own."""
    value = next((message[key] for key in REASONING if message.get(key) is not None), "")
    return value if isinstance(value, str) else ""


def missing(message: Row, region: str) -> str | None:
    """What the message says and `region` does not hold, in words; None where nothing is missing."""
    squeezed = SPACE.sub("", region)
    for text in texts(message):
        if not _holds(squeezed, text):
            return shorten(text)
    thought = reasoning(message)
    if thought.strip() and not _holds(squeezed, thought):
        return f"the reasoning {shorten(thought)}"
    for call in message.get("tool_calls") or []:
        name, arguments = call["function"]["name"], call["function"].get("arguments", {})
        if not _holds(squeezed, name):
            return shorten(name)
        for key, value in leaves(arguments):
            if not all(_holds(squeezed, part) for part in (key, value) if part):
                return f"the argument {key or shorten(value)} of the tool call {name}"
    return None


def _holds(squeezed: str, text: str) -> bool:
    return any(SPACE.sub("", form) in squeezed for form in _spellings(text))


def _spellings(text: str) -> Iterator[str]:
    yield text
    yield json.dumps(text, ensure_ascii=False)[1:-1]
    yield json.dumps(text)[1:-1]
    yield repr(text)[1:-1]
    if text in ("true", "false", "null"):
        yield {"true": "True", "false": "False", "null": "None"}[text]


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Keys with their scalar values, written as JSON writes them but for the quotes of a text."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, str(name))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from leaves(inner, key)
    else:
        yield key, value.strip() if isinstance(value, str) else json.dumps(value)


def shorten(text: str) -> str:
    return repr(text.strip()[:40])


def as_python(message: Row, region: str) -> str | None:
    """The tool call whose arguments the template writes as Python does, with single quotes: no model may learn that."""
    for call in message.get("tool_calls") or []:
        arguments = call["function"].get("arguments")
        if isinstance(arguments, dict) and arguments and str(arguments) in region and json.dumps(arguments) != str(arguments):
            return str(call["function"]["name"])
    return None


def as_quoted(message: Row, region: str) -> str | None:
    """The tool call whose arguments, given as text, stand in the turn as a quoted JSON string inside JSON."""
    for call in message.get("tool_calls") or []:
        text = call["function"].get("arguments")
        if isinstance(text, str) and any(json.dumps(text, ensure_ascii=ascii_) in region for ascii_ in (False, True)):
            return str(call["function"]["name"])
    return None


def disguised(message: Row) -> tuple[Row, dict[str, str]]:
    """The message with every saying replaced by a word of its own, and what each word stands for.

    A word begins and ends otherwise than what it replaces, so that two renderings part ways exactly there.
    """
    words: dict[str, str] = {}

    def word(original: str, what: str) -> str:
        first = "K" if original.strip()[:1] == "Z" else "Z"
        last = "k" if original.strip()[-1:] == "z" else "z"
        made = f"{first}q{len(words)}w{last}"
        words[made] = what
        return made

    def scalar(value: Any, key: str, name: str) -> Any:
        if isinstance(value, dict):
            return {inner: scalar(item, str(inner), name) for inner, item in value.items()}
        if isinstance(value, list):
            return [scalar(item, key, name) for item in value]
        original = value if isinstance(value, str) else json.dumps(value)
        return word(original, f"the argument {key} of the tool call {name}")

    changed = dict(message)
    for key in REASONING:
        if isinstance(message.get(key), str) and message[key].strip():
            changed[key] = next((w for w, what in words.items() if what.startswith("the reasoning")), None) or word(
                message[key], f"the reasoning {shorten(message[key])}"
            )
    content = message.get("content")
    if isinstance(content, str) and (content.strip() or not message.get("tool_calls")):
        changed["content"] = word(content, shorten(content))
    elif isinstance(content, list):
        changed["content"] = [
            {**part, "text": word(part["text"], shorten(part["text"]))}
            if isinstance(part, dict) and isinstance(part.get("text"), str) and part["text"].strip()
            else part
            for part in content
        ]
    if message.get("tool_calls"):
        calls = []
        for call in message["tool_calls"]:
            name, arguments = call["function"]["name"], call["function"].get("arguments", {})
            hidden = word(name, shorten(name))
            given = (
                {key: scalar(value, str(key), name) for key, value in arguments.items()}
                if isinstance(arguments, dict)
                else arguments
            )
            calls.append({**call, "function": {**call["function"], "name": hidden, "arguments": given}})
        changed["tool_calls"] = calls
    return changed, words
