"""Token ids to text as they come: never half a character, special tokens only where a format reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

BROKEN = "\ufffd"
LONGEST = 16  # tokens that one character may take; more are no text


class Decoder:
    """Decodes one token after the other, so that it does not matter in what pieces they come.

    kept: whether a special token, by its text, is read; others are left out. dropped: ids that are left out unless kept.
    """

    def __init__(self, tokenizer: Any, kept: Callable[[str], bool], dropped: frozenset[int] = frozenset()) -> None:
        self.tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {number: token.content for number, token in added.items() if token.special}
        for number in {*tokenizer.all_special_ids, *dropped} - set(special):
            special[number] = str(tokenizer.convert_ids_to_tokens(number))
        self.special = {number: text if kept(text) else "" for number, text in special.items()}
        self.window: list[int] = []
        self.start = 0  # of the tokens whose text is not told yet; those before it are decoded along, for their context

    def feed(self, token: int) -> str:
        if token in self.special:
            return self.close() + self.special[token]
        self.window.append(token)
        said, whole = self._decode(self.window[: self.start]), self._decode(self.window)
        if whole.endswith(BROKEN) and len(self.window) - self.start < LONGEST:
            return ""
        self.window, self.start = self.window[self.start :], len(self.window) - self.start
        return whole[len(said) :]

    def close(self) -> str:
        """What is left: a character that is cut in two is written as decoding all at once writes it."""
        said, whole = self._decode(self.window[: self.start]), self._decode(self.window)
        self.window, self.start = [], 0
        return whole[len(said) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)) if ids else ""
