"""The `plain` template: the row's text as it is, every token trained, the end-of-text token last. For pre-training.

A message's `weight` and `train: false` hold for its own text. A picture, video or sound stands where its part does, as the
placeholder that the processor expands.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from swift_core.types import Batch, Row, Sample

from swift_plugin_transformers.collation import collate, pack
from swift_plugin_transformers.config import PlainTemplateConfig
from swift_plugin_transformers.loss_weights import Piece, message_weight, token_weights, trained_spans
from swift_plugin_transformers.media import Placed, collect, part_kind
from swift_plugin_transformers.multimodal import PLACES_ITSELF, Multimodal, open_media


class PlainTemplate:
    """Texts of all messages joined; nothing is added but the tokenizer's own first token and the end."""

    def __init__(self, processor: Any, config: PlainTemplateConfig) -> None:
        self.tokenizer, self.config = getattr(processor, "tokenizer", processor), config
        self.processor = processor
        self.media = open_media(processor, config.media, self.joined)

    @property
    def prefetch(self) -> int:
        """Steps whose batches are worth making in advance."""
        return self.media.options.prefetch if self.media is not None else 0

    def encode(self, row: Row) -> list[Sample]:
        """One sample. Raises ValueError for a row without text."""
        messages, media = self.media.collect(row) if self.media is not None else collect(row)
        shown = [medium for placed in media for medium in placed]
        if shown and self.media is None:
            raise ValueError("the row has media, and this checkpoint takes text only")
        parts = [(self._text(message), message_weight(message)) for message in messages]
        text = "".join(part for part, _ in parts)
        if not text:
            raise ValueError("the row has no text")
        if shown and self.media is not None:
            return [self._with_media(self.media, text, parts, shown)]
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

    def _with_media(self, media: Multimodal, text: str, parts: list[tuple[str, float]], shown: Placed) -> Sample:
        """The end-of-text token is part of the text: the processor is given it again when a batch is made."""
        turns = [n for n, (_, weight) in enumerate(parts) if weight]
        if self.config.end and self.tokenizer.eos_token and not text.endswith(self.tokenizer.eos_token):
            parts = [*parts[:-1], (parts[-1][0] + self.tokenizer.eos_token, parts[-1][1])]
        text = "".join(part for part, _ in parts)
        ends = list(accumulate(len(part) for part, _ in parts))
        pieces: list[Piece] = [(end - len(part), end, weight) for end, (part, weight) in zip(ends, parts, strict=True) if part]
        ids, weights, held = media.encode(text, shown, pieces)
        return Sample(ids, weights, text=text, spans=trained_spans(pieces), turns=turns, media=held)

    def joined(self, messages: Sequence[Row]) -> str:
        """The text of messages."""
        return "".join(map(self._text, messages))

    def _text(self, message: Row) -> str:
        content = message.get("content") or ""
        if isinstance(content, str):
            return content
        return "".join(self._placeholder(part_kind(part)) if part_kind(part) else part.get("text", "") for part in content)

    def _placeholder(self, kind: str | None) -> str:
        """What the processor expands: the marker that begins a picture, where it has one of its own for that."""
        if type(self.processor).__name__ in PLACES_ITSELF:
            return ""
        names = ("boi_token", "image_token") if kind == "image" else ("boa_token", "audio_token") if kind == "audio" else ()
        for name in (*names, f"{kind}_token"):
            if isinstance(found := getattr(self.processor, name, None), str):
                return found
        raise ValueError(f"this checkpoint's processor names no placeholder for {kind}s; template=checkpoint may place them")

    def prompt(self, messages: list[Row], tools: list[Any] | None = None, **kwargs: Any) -> list[int]:
        return list(self.tokenizer(self.joined(messages))["input_ids"])

    def inputs(
        self, messages: list[Row], media: dict[str, list[Any]] | None = None, tools: list[Any] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """What a model's generate takes for one prompt; see `ChatTemplate.inputs`."""
        row = {"messages": messages, **(media or {})}
        shown, placed = self.media.collect(row) if self.media is not None else collect(row)
        text = self.joined(shown)
        if self.media is None:
            return dict(self.tokenizer(text, return_tensors="pt"))
        return self.media.inputs(text, [medium for found in placed for medium in found])

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def stop_ids(self) -> list[int]:
        return [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]

    def collate(self, samples: Sequence[Sample]) -> Batch:
        pad = self.tokenizer.pad_token_id or 0
        return collate(samples, pad) if self.media is None else self.media.collate(samples, pad)

    def pack(self, samples: Sequence[Sample], share: bool | Sequence[int] = False) -> Sample | None:
        return pack(samples, share)
