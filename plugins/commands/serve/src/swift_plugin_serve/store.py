"""Responses kept for `previous_response_id`, in bounded memory: the oldest go first."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from swift_plugin_serve.errors import text_of


@dataclass(frozen=True)
class Stored:
    """A response, and the conversation up to its end as messages of the chat form."""

    response: dict[str, Any]
    messages: list[dict[str, Any]]
    media: dict[str, list[Any]]
    size: int  # characters


class Store:
    """At most `count` responses, whose texts and media take at most `size` characters together."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size, self.used = count, size, 0
        self._kept: OrderedDict[str, Stored] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, ident: str, response: dict[str, Any], messages: list[dict[str, Any]], media: dict[str, list[Any]]) -> None:
        """Keep a response; one that is larger than all the room is not kept."""
        size = sum(len(text_of(part)) for part in (response, messages, media))
        if size > self.size or not self.count:
            return
        self._kept[ident] = Stored(response, messages, media, size)
        self.used += size
        while len(self._kept) > self.count or self.used > self.size:
            _, old = self._kept.popitem(last=False)
            self.used -= old.size

    def get(self, ident: str) -> Stored | None:
        if ident in self._kept:
            self._kept.move_to_end(ident)
        return self._kept.get(ident)

    def remove(self, ident: str) -> bool:
        found = self._kept.pop(ident, None)
        self.used -= found.size if found else 0
        return found is not None
