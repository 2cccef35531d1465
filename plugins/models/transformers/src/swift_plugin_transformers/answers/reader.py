"""Reads one answer as its tokens come: an `AnswerReader` of the kernel's.

Content is passed on as soon as it cannot be a mark. White space between content, reasoning and calls is the template's; that
within a text is the text's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from swift_core.types import AnswerDelta

from swift_plugin_transformers.answers.calls import CallFormat
from swift_plugin_transformers.answers.decoding import Decoder
from swift_plugin_transformers.answers.harmony import Harmony, begun
from swift_plugin_transformers.answers.text import Malformed, Reads, Text

TAIL = 256  # tokens of a prompt's end that are looked at


@dataclass(frozen=True)
class AnswerFormat:
    """How one checkpoint's template writes an answer."""

    calls: CallFormat | Harmony
    opening: str = ""  # of reasoning
    closing: str = ""
    lead: str = ""  # what stands before a plain answer's content
    ends: tuple[str, ...] = ()  # marks that end a turn, or content
    learnt: bool = True  # False where the template writes no calls, and a common format stands in
    strip: bool = False  # whether white space before the content is the template's
    gap: str = ""  # white space between reasoning and a call
    open_prompt: bool = False  # whether the generation prompt ends inside reasoning

    @property
    def texts(self) -> tuple[str, ...]:
        return (*self.calls.texts, self.opening, self.closing, self.lead)


class Reader:
    """See `swift_core.types.AnswerReader`."""

    def __init__(self, tokenizer: Any, form: AnswerFormat, prompt: Sequence[int], tools: Any, stops: Sequence[int]) -> None:
        def kept(word: str) -> bool:
            return bool(word) and any(word in text for text in form.texts)

        self.decoder = Decoder(tokenizer, kept, frozenset(stops))
        self.text = Text(schemas(tools))
        tail = str(tokenizer.decode(list(prompt)[-TAIL:], skip_special_tokens=False)) if len(prompt) else ""
        self.split = Splitter(self.text, form, tail)
        self.running = self.split.run()
        self.ended = False

    def feed(self, ids: Sequence[int]) -> list[AnswerDelta]:
        """Deltas of these tokens."""
        found: list[AnswerDelta] = []
        for token in ids:
            if said := self.decoder.feed(int(token)):
                self.text.held += said
                self._step(found)
        return found

    def close(self) -> list[AnswerDelta]:
        """The rest."""
        found: list[AnswerDelta] = []
        if not self.ended:
            self.text.held += self.decoder.close()
            self.text.closed = True
            self._step(found)
        return found

    def _step(self, found: list[AnswerDelta]) -> None:
        for delta in self.running:
            if delta is None:
                if self.text.closed:
                    continue
                return
            if delta.content or delta.reasoning or delta.call is not None:
                join(found, delta)
        self.ended = True


def join(found: list[AnswerDelta], delta: AnswerDelta) -> None:
    """Add a delta, to the last one where it only goes on with it."""
    last = found[-1] if found else None
    if last is None or last.call != delta.call or delta.name or bool(last.reasoning) != bool(delta.reasoning):
        found.append(delta)
        return
    last.content, last.reasoning = last.content + delta.content, last.reasoning + delta.reasoning
    last.arguments += delta.arguments


def schemas(tools: Any) -> dict[str, dict[str, Any]]:
    """The tools' parameters by name."""
    functions = [tool.get("function", tool) for tool in tools or () if isinstance(tool, dict)]
    return {str(each["name"]): each.get("parameters") or {} for each in functions if isinstance(each, dict) and "name" in each}


class Splitter:
    """Tells reasoning, content and calls apart, in the text of one answer."""

    def __init__(self, text: Text, form: AnswerFormat, prompt: str) -> None:
        self.text, self.form = text, form
        self.blank = ""  # white space that may be the text's or the template's
        self.fresh = True  # nothing was said yet since the answer or a call began
        self.strip = False  # white space in front is the template's
        self.reasoning = False
        if isinstance(form.calls, Harmony):
            text.held = form.calls.prompted(prompt)
            return
        text.held = form.calls.prompted if form.calls.prompted and prompt.endswith(form.calls.prompted) else ""
        end = prompt.rstrip()
        self.reasoning = bool(form.opening) and end.endswith(form.opening)
        self.strip = form.strip or self.reasoning or (bool(form.closing) and end.endswith(form.closing))

    def run(self) -> Reads:
        """All of an answer."""
        if isinstance(self.form.calls, Harmony):
            yield from self.form.calls.read(self.text)
            return
        while (yield from self.text.need()):
            if self.fresh and not self.reasoning and (yield from self._bare_call()):
                continue
            at, mark = self._mark()
            if at < 0:
                marks = () if self.text.closed else self._marks()
                kept = begun(self.text.held, marks)
                yield self._said(self.text.take(len(self.text.held) - kept))
                self.text.commit()
                if kept:
                    yield None
                continue
            if not self.text.closed and any(m != mark and m.startswith(self.text.held[at:]) for m in self._marks()):
                yield self._said(self.text.take(at))
                self.text.commit()
                yield None  # a longer mark may stand here
                continue
            yield self._said(self.text.take(at))
            self.text.commit()
            yield from self._at(mark)
        if self.blank and not self.reasoning:
            yield AnswerDelta(content=self.blank)

    def _marks(self) -> tuple[str, ...]:
        """What may come now and is not content."""
        form, calls = self.form, self.form.calls
        call = (calls.mark,) if isinstance(calls, CallFormat) and self.text.tools and calls.mark else ()
        if self.reasoning:
            return tuple(mark for mark in (*call, form.closing, *form.ends) if mark)
        opens = (form.opening,) if self.fresh else ()
        return tuple(mark for mark in (*call, *opens, form.lead, *form.ends) if mark)

    def _mark(self) -> tuple[int, str]:
        """The first mark in what is held, the longest of those that stand there."""
        found = [(at, -len(mark), mark) for mark in self._marks() if (at := self.text.held.find(mark)) >= 0]
        at, _, mark = min(found, default=(-1, 0, ""))
        return at, mark

    def _at(self, mark: str) -> Reads:
        form, calls = self.form, self.form.calls
        if isinstance(calls, CallFormat) and mark == calls.mark and mark not in (form.closing, form.lead):
            yield from self._call(mark)
        elif mark == form.closing and self.reasoning:
            self._turn(False)
            self.text.take(len(mark))
        elif mark == form.opening and self.fresh and not self.reasoning:
            self._turn(True)
            self.text.take(len(mark))
        else:
            self.text.take(len(mark))
            if mark == form.lead:
                self.strip, self.blank = mark.strip() == mark, ""
        self.text.commit()

    def _turn(self, reasoning: bool) -> None:
        self.reasoning, self.fresh, self.strip, self.blank = reasoning, True, True, ""

    def _bare_call(self) -> Reads:
        """Read calls that no mark begins; whether there were any."""
        calls = self.form.calls
        if not isinstance(calls, CallFormat) or calls.mark or not self.text.tools or self.text.calls:
            return False
        if self.text.held.isspace():
            self.blank += self.text.take(len(self.text.held))
            self.text.commit()
            return True
        if not calls.begins(self.text.held.lstrip()[0]):
            return False
        return (yield from self._call(""))

    def _call(self, mark: str) -> Reads:
        """Read calls from here on; one that is malformed is said as it was written."""
        assert isinstance(self.form.calls, CallFormat)
        before = self.text.whole
        try:
            yield from self.form.calls.read(self.text)
        except Malformed:
            self.text.back()
            if self.text.whole > before:
                self._turn(False)
            bare = self.text.held.lstrip()
            if bare.startswith(mark):  # it is not looked at again
                part = self.text.take(len(self.text.held) - len(bare) + max(1, len(mark)))
                yield AnswerDelta() if mark in self.form.ends else self._said(part)
                self.text.commit()
                self.fresh = False
            return True
        self._turn(False)
        return True

    def _said(self, part: str) -> AnswerDelta:
        """Content or reasoning; white space at its end is held back until more comes."""
        part, self.blank = self.blank + part, ""
        bare = part.rstrip()
        if not bare:
            self.blank = "" if self.strip and self.fresh else part
            return AnswerDelta()
        self.blank = part[len(bare) :]
        if self.fresh and self.strip:
            bare = bare.lstrip()
        self.fresh = False
        return AnswerDelta(reasoning=bare) if self.reasoning else AnswerDelta(content=bare)
