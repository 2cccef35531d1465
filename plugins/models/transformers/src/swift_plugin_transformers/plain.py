"""The `plain` template: the row's text as it is, every token trained, the end-of-text token last. For pre-training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from swift_core.types import Batch, Row, Sample

from swift_plugin_transformers.collation import collate, pack
from swift_plugin_transformers.config import PlainTemplateConfig


class PlainTemplate:
    """Texts of all messages joined; nothing is added but the tokenizer's own first token and the end."""

    def __init__(self, tokenizer: Any, config: PlainTemplateConfig) -> None:
        self.tokenizer, self.config = tokenizer, config

    def encode(self, row: Row) -> list[Sample]:
        """One sample. Raises ValueError for a row without text."""
        text = "".join(_text(message) for message in row["messages"])
        if not text:
            raise ValueError("the row has no text")
        ids = list(self.tokenizer(text)["input_ids"])
        if self.config.end and self.tokenizer.eos_token_id is not None and ids[-1] != self.tokenizer.eos_token_id:
            ids.append(self.tokenizer.eos_token_id)
        return [Sample(ids, [1.0] * len(ids), text=text, spans=[(0, len(text))], turns=list(range(len(row["messages"]))))]

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
