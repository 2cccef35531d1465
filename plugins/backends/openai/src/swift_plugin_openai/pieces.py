"""Text of token ids as they come: whole characters only, and nothing of what may turn out to be a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from swift_core.types import Template

BROKEN = "\ufffd"  # how a decoder shows a character that lacks bytes
BEFORE = 6  # tokens before the new ones that are decoded along, since a decoder may join or strip at the start


class Pieces:
    """Detokenizes one answer with the template. `feed` gives what is new; `text` is the whole so far, cut at a stop string."""

    def __init__(self, template: Template, stops: Sequence[str]) -> None:
        self.template, self.stops = template, stops
        self.ids: list[int] = []
        self.seen = ""  # decoded, whole characters
        self.shown = 0  # characters of it given out
        self.done = 0  # ids decoded into `seen`
        self.stopped = False

    def feed(self, ids: Sequence[int]) -> str:
        """The text that further ids add and that is certain."""
        self.ids += ids
        if self.stopped:
            return ""
        start = max(0, self.done - BEFORE)
        before = self.template.decode(self.ids[start : self.done])
        now = self.template.decode(self.ids[start:])
        if not now.endswith(BROKEN) and len(now) >= len(before):
            self.seen += now[len(before) :]
            self.done = len(self.ids)
        found = first_stop(self.seen, self.stops)
        if found is not None:
            self.stopped, self.seen = True, self.seen[:found]
        certain = len(self.seen) if self.stopped else len(self.seen) - begun_stop(self.seen, self.stops)
        new = self.seen[self.shown : certain]
        self.shown = max(self.shown, certain)
        return new

    def whole(self) -> str:
        """The text of all ids, decoded at once."""
        text = self.template.decode(self.ids)
        found = first_stop(text, self.stops)
        return text if found is None else text[:found]


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    return min((text.index(stop) for stop in stops if stop in text), default=None)


def begun_stop(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of a text may begin a stop string."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
