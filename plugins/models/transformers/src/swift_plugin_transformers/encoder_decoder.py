"""Templates of encoder-decoders: the encoder reads the prompt, the decoder learns the answer alone.

Each trained answer is a sample of its own: ids of all that stands before it, the token that a decoder starts with, ids of the
answer; `label` says where the second part begins. A batch's labels are what the decoder is given, so that each of its tokens is
predicted from those before it, as everywhere else. Nothing is packed. Shapes: B samples, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from swift_core.errors import RequestError
from swift_core.types import Batch, Row, Sample

from swift_plugin_transformers.chat import NOTHING, ChatTemplate
from swift_plugin_transformers.collation import collate
from swift_plugin_transformers.config import ChatTemplateConfig, PlainTemplateConfig
from swift_plugin_transformers.loss_weights import (
    STRATEGIES,
    Piece,
    by_regex,
    compile_spans,
    message_weight,
    token_weights,
    trained_spans,
)
from swift_plugin_transformers.media import KINDS, Placed, collect, frozen
from swift_plugin_transformers.plain import PlainTemplate
from swift_plugin_transformers.prompts import padded_prompts
from swift_plugin_transformers.rendering import Conversation, has_template
from swift_plugin_transformers.tensors import Layout, padded
from swift_plugin_transformers.turns import find_turn

LANGUAGES = ("src_lang", "tgt_lang")  # of a translator's tokenizer, which writes them before or after a text
BEFORE = "nothing stands before the answer: an encoder-decoder reads a prompt, and answers it"


def decodes(processor: Any) -> bool:
    """Whether a processor is that of an encoder-decoder, as its loader found."""
    return hasattr(getattr(processor, "tokenizer", processor), "decoder_start")


def open_template(processor: Any, config: ChatTemplateConfig | PlainTemplateConfig) -> Any:
    """The template of an encoder-decoder: by its chat template where it has one and that is asked for, else plain texts.
    Raises RequestError where nothing tells the token that its decoder starts with."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer.decoder_start is None:
        raise RequestError(
            "this encoder-decoder's config.json names no decoder_start_token_id, the token that its decoder starts with: set it"
        )
    if getattr(config, "loss", None) == "all":
        raise RequestError("template.loss=all: an encoder-decoder does not predict its prompt; assistant and last are learnt")
    if isinstance(config, ChatTemplateConfig) and has_template(processor, config):
        return ChatAnswers(processor, config)
    return PlainAnswers(processor, config)


class Answers:
    """What both templates share. `Sample.label` is {"encoder": tokens that the encoder reads, "characters": of them}."""

    tokenizer: Any
    media: Any

    def pair(
        self, source: str, shown: Placed, answer: tuple[list[int], list[float]], special: bool, said: str, **more: Any
    ) -> Sample:
        """A sample of a prompt's text with its media, and an answer's ids and weights. `said`: its text, to be shown."""
        if not self.reads_text:
            self.media.seen(shown)
            given = self.prefix(source)
            return Sample(
                [*given, *answer[0]], [0.0] * len(given) + answer[1], text=source + said,
                media={KINDS[kind]: [reference] for kind, reference in shown}, label={"encoder": 0, "characters": 0}, **more,
            )  # fmt: skip
        if self.media is not None:
            ids, _, media = self.media.encode(source, shown, [])
        else:
            ids, media = list(self.tokenizer(source, add_special_tokens=special)["input_ids"]), {}
        if not ids:
            raise ValueError(BEFORE)
        return Sample(
            [*ids, self.tokenizer.decoder_start, *answer[0]], [0.0] * (len(ids) + 1) + answer[1], text=source + said,
            media=media, label={"encoder": len(ids), "characters": len(source)}, **more,
        )  # fmt: skip

    @property
    def reads_text(self) -> bool:
        """Whether the encoder takes text. Else a prompt's text is what the decoder begins with, as Donut's is."""
        return self.media is None or self.tokenizer.encoder_reads_text

    def prefix(self, text: str) -> list[int]:
        """What the decoder begins with where a prompt's text is not the encoder's."""
        return [self.tokenizer.decoder_start, *self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def alone(self, ids: Sequence[int]) -> Sample:
        """Ids of which nobody says what is prompt and what answer: the encoder reads them, and the decoder writes them, the
        first one aside, for the token that it starts with stands there. An encoder that takes no text sees a grey picture."""
        if not self.reads_text:
            media = {"images": [blank()]} if "image" in self.media.kinds else {"audios": [silence(self.media.rate)]}
            answer = [self.tokenizer.decoder_start, *ids[1:]]
            return Sample(answer, [0.0] + [1.0] * len(ids[1:]), media=media, label={"encoder": 0, "characters": 0})
        label = {"encoder": len(ids), "characters": 0}
        return Sample([*ids, self.tokenizer.decoder_start, *ids[1:]], [0.0] * len(ids) + [1.0] * len(ids), label=label)

    def split(self, sample: Sample) -> tuple[Sample, Sample]:
        """What the encoder reads of a sample, and what the decoder is given. Raises RequestError where its label is gone."""
        if not isinstance(sample.label, dict) or "encoder" not in sample.label:
            raise RequestError(
                "an encoder-decoder learns by trainer sft: samples of this trainer tell no prompt from its answer"
            )
        count = sample.label["encoder"]
        text = sample.text[: sample.label["characters"]]
        source = Sample(sample.input_ids[:count], [0.0] * count, sample.row, sample.where, text=text, media=sample.media)
        return source, Sample(sample.input_ids[count:], sample.weights[count:], sample.row)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        pad = self.tokenizer.pad_token_id or 0
        sources, answers = zip(*map(self.split, samples), strict=True)
        made = collate(answers, pad)
        decoder = {f"decoder_{name}": tensor for name, tensor in made.inputs.items()}
        if not self.reads_text:
            seen = together([self.media.seen(placed_of(sample), sample.where) for sample in samples])
            found = {**seen, **decoder}
            return Batch(found, made.labels, made.weights, made.rows, made.weight, made.tokens, made.trained_tokens)
        read = collate(sources, pad) if self.media is None else self.media.collate(sources, pad)
        tokens = read.tokens + made.tokens
        return Batch({**read.inputs, **decoder}, made.labels, made.weights, made.rows, made.weight, tokens, made.trained_tokens)

    def read(self, text: str, placed: Sequence[Placed]) -> dict[str, Any]:
        """What generate takes where the encoder takes no text."""
        seen = self.media.seen([medium for found in placed for medium in found])
        return {**seen, "decoder_input_ids": torch.tensor([self.prefix(text)])}

    def batch(self, prompts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Several prompts as `inputs` gives them, padded on the right, as an encoder reads them in training. Where the decoder
        begins with their text it must be of one length."""
        if not self.reads_text:
            return together(prompts)
        extras, layout = (self.media.extras, self.media.layout) if self.media else ((), Layout())
        return padded_prompts(prompts, self.tokenizer.pad_token_id or 0, extras, layout, right=True)

    def pack(self, samples: Sequence[Sample], share: bool | Sequence[int] = False) -> Sample | None:
        return None


def together(found: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Tensors of several texts one below the other, padded with zeros where their sizes differ."""
    return {key: torch.cat(padded([tensors[key] for tensors in found])) for key in found[0]}


def placed_of(sample: Sample) -> Placed:
    return [(kind, reference) for kind, key in KINDS.items() for reference in sample.media.get(key, ())]


def blank() -> Any:
    from PIL import Image

    return frozen(Image.new("RGB", (96, 64), (90, 120, 30)), "image")


def silence(rate: int) -> Any:
    return frozen({"array": [0.1, -0.1] * rate, "sampling_rate": rate}, "audio")


class ChatAnswers(Answers, ChatTemplate):
    """With a chat template: the prompt is the rendering up to where the answer begins, which ends as its turn does."""

    def fingerprint(self) -> str:
        return f"{super().fingerprint()}-{self.tokenizer.decoder_start}"

    def inputs(
        self, messages: list[Row], media: dict[str, list[Any]] | None = None, tools: list[Any] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """See `ChatTemplate.inputs`; with decoder_input_ids [1, T] where the encoder takes no text."""
        if self.reads_text:
            return super().inputs(messages, media, tools, **kwargs)
        shown, placed = self.collect({"messages": messages, **(media or {})})
        return self.read(self.prompt_text(shown, tools, **kwargs), placed)

    def _encode(self, conversation: Conversation, trained: list[int], media: list[Placed]) -> list[Sample]:
        messages, facts = conversation.messages, self.facts(conversation.tools, conversation.kwargs)
        samples = []
        for n in trained:
            turn = find_turn(conversation, n, facts, self.markers)
            source, said = turn.text[: turn.hole], turn.text[turn.hole : turn.end]
            pieces = self._pieces(messages, turn)
            found = self.tokenizer(said, add_special_tokens=False, return_offsets_mapping=True)
            inside = [(start - turn.hole, end - turn.hole, weight) for start, end, weight in pieces]
            answer = list(found["input_ids"]), token_weights(found["offset_mapping"], inside)
            samples.append(
                self.pair(
                    source, [m for placed in media[:n] for m in placed], answer, False, said, turns=[n],
                    spans=trained_spans(pieces), appended=turn.appended, kwargs=dict(conversation.kwargs),
                    notes=list(turn.notes),
                )
            )  # fmt: skip
        return samples


class PlainAnswers(Answers, PlainTemplate):
    """Without a chat template: the prompt is what was said before, a message a line, the answer what is said, and both have the
    tokenizer's own first and last tokens."""

    def __init__(self, processor: Any, config: ChatTemplateConfig | PlainTemplateConfig) -> None:
        super().__init__(processor, PlainTemplateConfig(getattr(config, "end", True), config.media))
        self.loss = getattr(config, "loss", "assistant")
        self.spans = compile_spans(getattr(config, "spans", {}))
        for name, value in getattr(config, "kwargs", {}).items():
            if name not in LANGUAGES or not hasattr(self.tokenizer, name):
                known = ", ".join(language for language in LANGUAGES if hasattr(self.tokenizer, language)) or "none"
                raise RequestError(f"template.kwargs: {name!r}: without a chat template its tokenizer's are set: {known}")
            setattr(self.tokenizer, name, value)

    def joined(self, messages: Sequence[Row]) -> str:
        return "\n".join(map(self._text, messages))

    def _placeholder(self, kind: str | None) -> str:
        return super()._placeholder(kind) if self.reads_text else ""

    def inputs(
        self, messages: list[Row], media: dict[str, list[Any]] | None = None, tools: list[Any] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """See `ChatAnswers.inputs`."""
        if self.reads_text:
            return super().inputs(messages, media, tools, **kwargs)
        shown, placed = self.media.collect({"messages": messages, **(media or {})})
        return self.read(self.joined(shown), placed)

    def encode(self, row: Row) -> list[Sample]:
        """A sample for each trained answer. Raises ValueError with the reason to refuse the row."""
        if row.get("tools") or any(message.get("tool_calls") for message in row["messages"]):
            raise ValueError("the row has tools, and this checkpoint no chat template that would write them")
        messages, media = self.media.collect(row) if self.media is not None else collect(row)
        if self.media is None and any(media):
            raise ValueError("the row has media, and this checkpoint takes text only")
        trained = [n for n in STRATEGIES[self.loss](messages) if self._text(messages[n])]
        if not trained:
            raise ValueError(NOTHING)
        return [self._sample(messages, media, n) for n in trained]

    def _sample(self, messages: list[Row], media: list[Placed], n: int) -> Sample:
        source, said, weight = self.joined(messages[:n]), self._text(messages[n]), message_weight(messages[n])
        shown = [medium for placed in media[:n] for medium in placed]
        if not source.strip() and not shown:
            raise ValueError(BEFORE)
        piece: Piece = (0, len(said), weight)
        pieces = by_regex(said, piece, self.spans) if self.spans else [piece]
        spans = [(start + len(source) + 1, end + len(source) + 1) for start, end in trained_spans(pieces)]
        return self.pair(source, shown, self.answer(said, pieces, weight), True, f"\n{said}", turns=[n], spans=spans)

    def answer(self, said: str, pieces: Sequence[Piece], weight: float) -> tuple[list[int], list[float]]:
        """Ids and weights of an answer, as the tokenizer writes targets, the end-of-text token last."""
        found = self.tokenizer(text_target=said, return_offsets_mapping=len(pieces) > 1)
        ids, eos = list(found["input_ids"]), self.tokenizer.eos_token_id
        weights = [weight] * len(ids)
        if len(pieces) > 1:
            inside = token_weights(found["offset_mapping"], pieces)
            weights = [
                own if end > start else weight for own, (start, end) in zip(inside, found["offset_mapping"], strict=True)
            ]
        if self.config.end and eos is not None and eos not in ids[-2:]:  # some end with the mark of a language after it
            return [*ids, eos], [*weights, weight]
        if not self.config.end and ids[-1:] == [eos]:
            return ids[:-1], weights[:-1]
        return ids, weights
