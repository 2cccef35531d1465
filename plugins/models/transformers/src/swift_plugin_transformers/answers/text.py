"""Text that arrives in pieces, read by generators: each yields None where it needs more, so that a format reads top to bottom.

What was taken since the last `commit` is kept: a call that turns out malformed is put back as it was written.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

Reads = Generator[Any, None, Any]  # of deltas, and None
LONGEST_HEAD = 1000  # characters within which something short must end, such as a name


class Malformed(Exception):
    """The text is not the call that it began as, or ends within it."""


@dataclass
class Text:
    """What has come and is not read yet (`held`), and the tools that may be called, by name."""

    tools: dict[str, dict[str, Any]] = field(default_factory=dict)  # JSON schemas of their arguments
    held: str = ""
    taken: str = ""
    closed: bool = False
    calls: int = 0  # begun so far
    whole: int = 0  # of them, those whose arguments are complete

    def need(self, count: int = 1) -> Reads:
        """Whether so many characters are there, once that is certain."""
        while len(self.held) < count and not self.closed:
            yield None
        return len(self.held) >= count

    def take(self, count: int) -> str:
        part, self.held = self.held[:count], self.held[count:]
        self.taken += part
        return part

    def commit(self) -> None:
        """What was taken is read for good."""
        self.taken = ""

    def done(self) -> None:
        """A call is whole."""
        self.whole += 1
        self.commit()

    def back(self) -> None:
        """Put back what was taken since the last commit."""
        self.held, self.taken = self.taken + self.held, ""

    def blank(self) -> Reads:
        """Take white space."""
        while (yield from self.need()) and self.held[0].isspace():
            self.take(len(self.held) - len(self.held.lstrip()))

    def peek(self) -> Reads:
        """The next character, after white space; raises Malformed at the end."""
        yield from self.blank()
        if not (yield from self.need()):
            raise Malformed
        return self.held[0]

    def follows(self, word: str) -> Reads:
        """Whether `word` comes next, after white space. Takes the white space only."""
        yield from self.blank()
        while len(self.held) < len(word) and word.startswith(self.held) and not self.closed:
            yield None
        return self.held.startswith(word)

    def passes(self, word: str) -> Reads:
        """Take `word` where it comes next. White space in front, inside and behind may differ."""
        if not word.strip():
            return True
        parts = word.split()
        for number, part in enumerate(parts):
            if not (yield from self.follows(part)):
                if number:
                    raise Malformed
                return False
            self.take(len(part))
        return True

    def expect(self, word: str) -> Reads:
        if not (yield from self.passes(word)):
            raise Malformed

    def until(self, words: Sequence[str], longest: int | None = None) -> Reads:
        """The text before the first of `words`, which is taken with it. Raises Malformed where none comes."""
        while True:
            found = [(at, -len(word)) for word in words if (at := self.held.find(word)) >= 0]
            if found:
                at, length = min(found)
                part = self.take(at)
                self.take(-length)
                return part
            if self.closed or (longest is not None and len(self.held) > longest):
                raise Malformed
            yield None

    def word(self, allowed: Any) -> Reads:
        """The longest run of characters of a class, such as a name; `allowed` is a compiled pattern of one character."""
        found = ""
        yield from self.blank()
        while (yield from self.need()) and allowed.match(self.held):
            found += self.take(1)
            if len(found) > LONGEST_HEAD:
                raise Malformed
        return found
