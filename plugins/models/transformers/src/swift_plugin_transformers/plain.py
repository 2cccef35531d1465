"""The `plain` template: the row's text as it is, every token trained, the end-of-text token last. For pre-training.

A message's `weight` and `train: false` hold for its own text.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from swift_core.types import Batch, Row, Sample

from swift_plugin_transformers.collation import collate, pack
from swift_plugin_transformers.config import PlainTemplateConfig
from swift_plugin_transformers.loss_weights import Piece, message_weight, token_weights, trained_spans


class PlainTemplate:
    """Texts of all messages joined; nothing is added but the tokenizer's own first token and the end."""

    def __init__(self, tokenizer: Any, config: PlainTemplateConfig) -> None:
        self.tokenizer, self.config = tokenizer, config

    def encode(self, row: Row) -> list[Sample]:
        """One sample. Raises ValueError for a row without text."""
        text = "".join(_text(message) for message in row["messages"])
        if not text:
            raise ValueError("the row has no text")
        parts = [(_text(message), message_weight(message)) for message in row["messages"]]
        turns, weighed = [n for n, (_, weight) in enumerate(parts) if weight], any(weight != 1.0 for _, weight in parts)
        encoded = self.tokenizer(text, return_offsets_mapping=weighed)
        ids, weights = list(encoded["input_ids"]), [1.0] * len(encoded["input_ids"])
        pieces: list[Piece] = [(0, len(text), 1.0)]
        if weighed:
            ends = list(accumulate(len(part) for part, _ in parts))
            pieces = [(end - len(part), end, weight) for end, (part, weight) in zip(ends, parts, strict=True) if part]
            weights = token_weights(encoded["offset_mapping"], pieces)
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is not None and ids[:2] == [bos, bos]:  # the text has a first token of its own
            del ids[0], weights[0]
        if self.config.end and eos is not None and ids[-1] != eos:
            ids.append(eos)
            weights.append(parts[-1][1])
        return [Sample(ids, weights, text=text, spans=trained_spans(pieces), turns=turns)]

    def prompt(self, messages: list[Row], tools: list[Any] | None = None, **kwargs: Any) -> list[int]:
        return list(self.tokenizer("".join(_text(message) for message in messages))["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def stop_ids(self) -> list[int]:
        return [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]

    def collate(self, samples: Sequence[Sample]) -> Batch:
        return collate(samples, self.tokenizer.pad_token_id or 0)

    def pack(self, samples: Sequence[Sample]) -> Sample | None:
        return pack(samples)


def _text(message: Row) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
