"""gpt-oss's harmony: an answer is several messages, each with a channel, and a call is a message to `functions.NAME`.

`analysis` is reasoning, `final` content, and `commentary` is a call's arguments, or content where nobody is addressed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from swift_core.types import AnswerDelta

from swift_plugin_transformers.answers.arguments import JsonArguments
from swift_plugin_transformers.answers.calls import arguments_of, begin
from swift_plugin_transformers.answers.text import Malformed, Reads, Text

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
MARKS = (START, CHANNEL, MESSAGE, *ENDS, "<|constrain|>")
TO = re.compile(r"\bto=(?:functions\.)?([\w.\-]+)")
NAMED = re.compile(r"<\|channel\|>\s*(\w+)")


@dataclass(frozen=True)
class Harmony:
    """The whole answer in this form. Without tools, a call stays content, as it was written."""

    texts: tuple[str, ...] = MARKS
    many: bool = False

    def prompted(self, prompt: str) -> str:
        """The part of a prompt's end that begins the answer's first message."""
        at = prompt.rfind(START)
        return prompt[at:] if at >= 0 and not any(end in prompt[at:] for end in ENDS) else ""

    def read(self, text: Text) -> Reads:
        """All messages to the answer's end."""
        while (yield from text.need()):
            try:
                header = yield from text.until([MESSAGE])
            except Malformed:  # words outside of any message
                yield AnswerDelta(content=_bare(text.take(len(text.held))))
                text.commit()
                return
            yield from self._message(text, header)

    def _message(self, text: Text, header: str) -> Reads:
        to = TO.search(header)
        named = NAMED.search(header)
        if to and text.tools:
            text.commit()
            written = header.replace(START + "assistant", "") + MESSAGE
            try:
                yield begin(text, to[1], known=False)
                yield from arguments_of(text, JsonArguments(), to[1])
                while not (yield from self._ended(text)):
                    text.take(1)
            except Malformed:
                text.back()
                yield AnswerDelta(content=written)
                yield from self._body(text, reasoning=False)
        else:
            yield from self._body(text, reasoning=bool(named) and named[1] == "analysis")  # type: ignore[index]
        text.commit()

    def _ended(self, text: Text) -> Reads:
        """Whether the message ends here; its end is taken."""
        if not (yield from text.need()):
            return True
        for end in (*ENDS, START):
            if (yield from text.follows(end)):
                if end != START:
                    text.take(len(end))
                return True
        return not (yield from text.need())

    def _body(self, text: Text, reasoning: bool) -> Reads:
        """A message's text as it comes, to its end."""
        while (yield from text.need()):
            found = [at for end in (*ENDS, START) if (at := text.held.find(end)) >= 0]
            if found:
                said = text.take(min(found))
                yield _piece(said, reasoning)
                for end in ENDS:
                    if text.held.startswith(end):
                        text.take(len(end))
                        break
                return
            kept = 0 if text.closed else begun(text.held, (*ENDS, START))
            yield _piece(text.take(len(text.held) - kept), reasoning)
            text.commit()
            if kept:
                yield None


def _piece(said: str, reasoning: bool) -> AnswerDelta:
    return AnswerDelta(reasoning=said) if reasoning else AnswerDelta(content=said)


def _bare(said: str) -> str:
    for mark in MARKS:
        said = said.replace(mark, "")
    return said.removeprefix("assistant")


def begun(held: str, marks: tuple[str, ...]) -> int:
    """How many of the last characters may begin one of the marks."""
    for length in range(min(len(held), max(map(len, marks), default=1) - 1), 0, -1):
        if any(len(mark) > length and mark.startswith(held[-length:]) for mark in marks):
            return length
    return 0
