"""How a template writes tool calls: what stands around a call and around all of them, and what a call itself is.

A call is whole when its arguments are: then it counts, whatever follows. Before that it may still turn out malformed.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from swift_core.types import AnswerDelta

from swift_plugin_transformers.answers.arguments import Arguments, collected, json_value
from swift_plugin_transformers.answers.arguments import JsonArguments as Json
from swift_plugin_transformers.answers.text import LONGEST_HEAD, Malformed, Reads, Text

NAME = re.compile(r"[\w.\-]")
HOLE = "\0"  # in a text that the template writes: a number or an id, other in each call
NAME_KEYS, ARGUMENT_KEYS = ("name", "tool_name"), ("arguments", "parameters", "args")
OTHER_KEYS = ("id", "type", "tool_call_id", "index")


def begin(text: Text, name: str, known: bool) -> AnswerDelta:
    """The first piece of a call. Raises Malformed for a name that no tool has, where only the name tells a call from text."""
    if not name or (known and name not in text.tools):
        raise Malformed
    text.calls += 1
    return AnswerDelta(call=text.calls - 1, name=name)


def arguments_of(text: Text, syntax: Arguments, name: str) -> Reads:
    number = text.calls - 1
    for piece in syntax.read(text, text.tools.get(name) or {}):
        if piece is None:
            yield None
        else:
            yield AnswerDelta(call=number, arguments=piece)
    text.done()


@dataclass(frozen=True)
class ObjectCall:
    """`{"name": "look_up", "arguments": {"word": "tea"}}`: a JSON object with the name and the arguments, in any order."""

    name_key: str = "name"
    arguments_key: str = "arguments"
    head: str = '{"name": "'  # as the template writes it, up to the name
    middle: str = '", "arguments": '
    tail: str = "}"

    def read(self, text: Text, known: bool) -> Reads:
        yield from text.expect("{")
        name, waiting, begun = "", None, False
        while not (yield from text.passes("}")):
            key = yield from collected(text)
            yield from text.expect(":")
            if key == "function" and (yield from text.peek()) == "{":
                yield from self.read(text, known)
                begun = True
            elif key in (self.name_key, *NAME_KEYS) and not name and (yield from text.peek()) == '"':
                name = yield from collected(text)
                if waiting is not None:
                    yield begin(text, name, known)
                    yield AnswerDelta(call=text.calls - 1, arguments=waiting)
                    text.done()
                    begun = True
            elif key in (self.arguments_key, *ARGUMENT_KEYS) and not begun:
                if name:
                    yield begin(text, name, known)
                    begun = True
                    yield from arguments_of(text, Json(), name)
                else:
                    value = yield from collected(text)
                    if not isinstance(value, dict):
                        raise Malformed
                    waiting = json.dumps(value, ensure_ascii=False)
            elif known and key not in OTHER_KEYS:
                raise Malformed  # an answer that is some other JSON
            else:
                for piece in json_value(text):
                    if piece is None:
                        yield None
            if not (yield from text.passes(",")) and (yield from text.peek()) != "}":
                raise Malformed
        if not begun:
            yield begin(text, name, known)
            yield AnswerDelta(call=text.calls - 1, arguments="{}")
            text.done()
        text.commit()


@dataclass(frozen=True)
class NamedCall:
    """A name, then its arguments in a syntax of their own; `middle` is the text between the two."""

    middle: str
    syntax: Arguments

    def read(self, text: Text, known: bool) -> Reads:
        name = yield from text.word(NAME)
        first, *others = self.middle.split(HOLE)
        yield from text.expect(first)
        for part in others:
            yield from text.until([part.strip()], LONGEST_HEAD)
        if not (yield from self.syntax.begins(text)):
            raise Malformed
        yield begin(text, name, known)
        yield from arguments_of(text, self.syntax, name)


@dataclass(frozen=True)
class CallFormat:
    """Where calls stand in an answer: `opening (before CALL after) separator (before CALL after) closing`, all
    calls in brackets where they are a list.

    All texts are as the template writes them; white space may differ when they are read. `prompted` is the part of what opens
    a call that stands at the generation prompt's end already.
    """

    call: ObjectCall | NamedCall
    opening: str = ""
    before: str = ""
    after: str = ""
    separator: str = ""
    closing: str = ""
    brackets: tuple[str, str] = ("", "")  # of a list of calls, with white space
    many: bool = True
    prompted: str = ""

    @property
    def mark(self) -> str:
        """What begins the calls in an answer; empty where only their own form tells."""
        words = (self.opening if self.opening.strip() else self.before).split()
        return words[0] if words else ""

    @property
    def texts(self) -> tuple[str, ...]:
        middle = self.call.middle
        syntax = [self.call.syntax] if isinstance(self.call, NamedCall) else []
        inner = [value for each in syntax for value in vars(each).values() if isinstance(value, str)]
        return (self.opening, self.before, self.after, self.closing, middle, *inner)

    def begins(self, letter: str) -> bool:
        """Whether an answer that starts with this character may be a call without a mark."""
        return not self.mark and letter in ("{[" if isinstance(self.call, ObjectCall) else "[")

    def read(self, text: Text) -> Reads:
        """The calls from here on. Raises Malformed, with all since the last whole call still in `text.taken`."""
        yield from text.expect(self.opening)
        bracket = (self.brackets[0] or not self.mark) and (yield from text.passes("["))
        while True:
            yield from text.expect(self.before)
            yield from self.call.read(text, known=not self.mark)
            yield from text.passes(self.after)
            text.commit()
            if bracket:
                if (yield from text.passes(",")):
                    continue
                yield from text.passes("]")
                break
            if self.separator.strip() and (yield from text.passes(self.separator)):
                continue
            if not self.before.strip() or not (yield from text.follows(self.before.split()[0])):
                break
        yield from text.passes(self.closing)
        text.commit()
