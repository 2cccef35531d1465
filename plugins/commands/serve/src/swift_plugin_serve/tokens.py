"""Texts to token ids and back, and what a single token stands for: its bytes, as OpenAI's log-probabilities tell them."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from functools import cached_property

from swift_core.types import Processor

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokens:
    """A processor's tokenizer. A lock keeps two threads from encoding at once."""

    def __init__(self, processor: Processor) -> None:
        self.own = getattr(processor, "tokenizer", processor)
        self.lock = threading.Lock()
        self._bytes: dict[int, bytes] = {}

    def encode(self, text: str, special: bool = True) -> list[int]:
        with self.lock:
            return [int(token) for token in self.own(text, add_special_tokens=special)["input_ids"]]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        with self.lock:
            return str(self.own.decode(list(ids), skip_special_tokens=False))

    def bytes(self, token: int) -> bytes:
        """What a token adds to a text."""
        if token not in self._bytes:
            self._bytes[token] = self._read(token)
        return self._bytes[token]

    def text(self, token: int) -> str:
        """A token as text; of bytes that are no whole character, a mark."""
        return self.bytes(token).decode("utf-8", "replace")

    @cached_property
    def count(self) -> int:
        return len(self.own)

    @cached_property
    def longest(self) -> int:
        """Characters of the longest token: no text has fewer tokens than its length by this."""
        return max((len(piece) for piece in self.own.get_vocab()), default=1)

    def _read(self, token: int) -> bytes:
        piece = self.own.convert_ids_to_tokens(token)
        if piece is None:
            return b""
        if token in self._added:
            return str(piece).encode("utf-8", "replace")
        if match := BYTE.fullmatch(piece):
            return bytes([int(match[1], 16)])
        if self._byte_level and all(char in _CHARS for char in piece):
            return bytes(_CHARS[char] for char in piece)
        if "\u2581" in piece:
            return piece.replace("\u2581", " ").encode("utf-8", "replace")
        return str(self.own.decode([token])).encode("utf-8", "replace")

    @cached_property
    def _added(self) -> set[int]:
        return {int(token) for token in getattr(self.own, "added_tokens_decoder", {})} | set(self.own.all_special_ids)

    @cached_property
    def _byte_level(self) -> bool:
        backend = getattr(self.own, "backend_tokenizer", None)
        return backend is None or "ByteLevel" in repr(backend.decoder)


def _char_of() -> dict[str, int]:
    """GPT-2's table: each of 256 bytes as a character that can be seen."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in seen}
    hidden = [byte for byte in range(256) if byte not in set(seen)]
    return table | {chr(256 + n): byte for n, byte in enumerate(hidden)}


_CHARS = _char_of()
