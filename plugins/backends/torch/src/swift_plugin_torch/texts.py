"""The text of an answer as its tokens come: whole characters only, never a stop string or the beginning of one.

Each token costs the decoding of a few tokens, however long the answer is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

WAITING = 16  # tokens that may wait for a character to become whole; more are bytes that make none
UNKNOWN = "\ufffd"


class Text:
    """The text of one answer, piece by piece."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, [text for text in stop if text]
        self._context: list[int] = []  # tokens whose text was told last: what stands before decides about spaces
        self._base = ""  # their text
        self._pending: list[int] = []  # tokens after them
        self._held = ""  # whole characters that may begin a stop string
        self.shown = ""  # all that was given away by `take`, and what waits there
        self._ready = ""

    def feed(self, token: int, stops: bool = True) -> bool:
        """Add a token. True where a stop string is complete; with `stops` false none is looked for."""
        self._pending.append(token)
        whole = self._decode([*self._context, *self._pending])
        new = whole[len(self._base) :]
        if not new:  # a special token, or a part of a character that shows nothing yet
            if len(self._pending) > WAITING:
                self._pending = []
        elif new.endswith(UNKNOWN) and len(self._pending) <= WAITING:
            return stops and self._ended(new.rstrip(UNKNOWN), keep=True)
        else:
            self._context, self._pending = self._pending, []
            self._base = self._decode(self._context)
            return self._ended(new, keep=False, stops=stops)
        return False

    def _ended(self, new: str, keep: bool, stops: bool = True) -> bool:
        """Whether `new`, after what is held, completes a stop string. With `keep` it is only looked at."""
        text = self._held + new
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0] if stops else []
        if places:
            self._show(text[: min(places)])
            self._held = ""
            return True
        if not keep:
            told = len(text) - self._begun(text)
            self._show(text[:told])
            self._held = text[told:]
        return False

    def _begun(self, text: str) -> int:
        """The length of the longest ending that may turn out to begin a stop string."""
        begun = (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return max(begun, default=0)

    def _show(self, text: str) -> None:
        self.shown += text
        self._ready += text

    def take(self) -> str:
        """What can be shown and was not yet."""
        ready, self._ready = self._ready, ""
        return ready

    def close(self, whole: str) -> None:
        """The answer is over, and reads `whole`: what was held back can be shown, but for a character cut in two."""
        if whole.startswith(self.shown):
            self._show(whole[len(self.shown) :].rstrip(UNKNOWN))
