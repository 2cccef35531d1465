"""The `checkpoint` template: the checkpoint's own chat template renders training rows, byte for byte as for inference.

The mask needs no marks in the template: see `turns`. The text is tokenized once, whole; character spans map to tokens by
offsets. A turn that the whole conversation renders otherwise becomes a sample of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from swift_core.config import build_options
from swift_core.errors import RequestError
from swift_core.types import Batch, Row, Sample

from swift_plugin_transformers.answers.grammar import call_grammar
from swift_plugin_transformers.answers.learn import learn as learn_answers
from swift_plugin_transformers.answers.reader import TAIL, AnswerFormat, Reader
from swift_plugin_transformers.collation import collate as collate_text
from swift_plugin_transformers.collation import pack
from swift_plugin_transformers.config import ChatTemplateConfig
from swift_plugin_transformers.grounding import Convention, ground_row
from swift_plugin_transformers.loss_weights import (
    STRATEGIES,
    Piece,
    by_regex,
    compile_spans,
    message_weight,
    overlay,
    token_weights,
    trained_spans,
    with_offsets,
)
from swift_plugin_transformers.markers import Markers, common_prefix, common_suffix
from swift_plugin_transformers.media import Placed, collect
from swift_plugin_transformers.multimodal import open_media
from swift_plugin_transformers.presence import disguised
from swift_plugin_transformers.prompts import padded_prompts
from swift_plugin_transformers.rendering import Conversation, Refused, Renderer, forms, standard
from swift_plugin_transformers.tensors import Layout
from swift_plugin_transformers.thinking import CALL, Block, choose, find_block, has_reasoning
from swift_plugin_transformers.turns import Facts, Turn, Unfit, find_turn, learn

NOTHING = "the row has no trainable token: no assistant message with content, or train: false on all"
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up", "description": "Look a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string", "description": "it"}}, "required": ["word"]},
    },
}  # fmt: skip


class ChatTemplate:
    """Renders and masks rows with a tokenizer's chat template."""

    def __init__(self, processor: Any, config: ChatTemplateConfig) -> None:
        self.processor, self.tokenizer, self.config = processor, getattr(processor, "tokenizer", processor), config
        self.renderer = Renderer(self.tokenizer, config, None if self.tokenizer is processor else processor)
        self.media = open_media(processor, config.media, lambda messages: self.renderer.render(messages, None, config.kwargs))
        self.convention = build_options(Convention, config.grounding, "template.grounding") or Convention()
        self.spans = compile_spans(config.spans)
        if config.loss == "spans" and not self.spans:
            raise RequestError('template.loss=spans needs template.spans, such as {"<tool_call>.+?</tool_call>": 2.0}')
        self.markers = Markers(self.tokenizer.all_special_tokens)
        self._blocks: dict[str, Block] = {}
        self._facts: dict[str, Facts] = {}
        self._chosen: dict[str, dict[str, Any]] = {}
        self._stops: list[int] | None = None

    @property
    def prefetch(self) -> int:
        """Steps whose batches are worth making in advance."""
        return self.media.options.prefetch if self.media is not None else 0

    @property
    def source(self) -> str | None:
        """The Jinja text that stands in for the tokenizer's own, if any."""
        return self.renderer.given

    def fingerprint(self) -> str:
        """A hash of all that rendering and tokenizing go by, besides the options."""
        own = self.tokenizer
        backend = own.backend_tokenizer.to_str() if getattr(own, "is_fast", False) else repr(own)
        media = self.processor.to_json_string() if hasattr(self.processor, "to_json_string") else ""
        templates = [str(getattr(holder, "chat_template", None)) for holder in (own, self.processor)]
        whole = json.dumps([backend, media, templates, self.renderer.given, own.special_tokens_map], default=str)
        return hashlib.sha256(whole.encode()).hexdigest()

    def encode(self, row: Row) -> list[Sample]:
        """The samples of a row: one with all turns that stand in the whole text as they were rendered, and one for each
        turn that does not. Raises ValueError with the reason to refuse the row."""
        shown, media = self.collect(self.grounded(row))
        messages, tools = standard(shown), row.get("tools")
        trained = STRATEGIES[self.config.loss](messages)
        if not trained:
            raise ValueError(NOTHING)
        kwargs = self.kwargs_for(messages, tools, {**self.config.kwargs, **(row.get("chat_template_kwargs") or {})})
        faults: list[Refused] = []
        for form in forms(messages):
            try:
                samples = self._encode(Conversation(self.renderer, messages, tools, kwargs, form), trained, media)
            except Refused as err:
                faults.append(err)
                continue
            for sample in samples:
                sample.notes += row.get("media_notes") or []
            return samples
        raise ValueError(str(next((err for err in faults if isinstance(err, Unfit)), faults[0])))

    def grounded(self, row: Row) -> Row:
        """The row with its `<ref-object>` and `<bbox>` tags as the checkpoint's family writes boxes. Raises ValueError."""
        return ground_row(row, self.convention, self.media) if row.get("objects") else row

    def collect(self, row: Row) -> tuple[list[Row], list[Placed]]:
        """A row's messages with bare media parts, and the media of each. Raises ValueError for media that have no place."""
        if self.media is not None:
            return self.media.collect(row)
        messages, media = collect(row)
        if any(media):
            raise ValueError("the row has media, and this checkpoint takes text only")
        return messages, media

    def kwargs_for(self, messages: list[Row], tools: Any, base: dict[str, Any]) -> dict[str, Any]:
        """`base` and, where the template has a thinking switch, its value for rows with or without reasoning."""
        key = self._key(tools, base)
        block = self._blocks.get(key) or find_block(self.renderer, tools, base, self.markers)
        if block:
            self._blocks[key] = block
        block = block or Block.of()
        reasoned = any(message["role"] == "assistant" and has_reasoning(message, block) for message in messages)
        key += str(reasoned)
        if key in self._chosen:
            return self._chosen[key]
        chosen = choose(self.renderer, tools, base, block, reasoned, self.markers)
        if chosen is not None:  # else it is asked again, as the row's own tools may be at fault: no row decides for others
            self._chosen[key] = chosen
        return base if chosen is None else chosen

    def facts(self, tools: Any, kwargs: dict[str, Any]) -> Facts:
        key = self._key(tools, kwargs)
        if key in self._facts:
            return self._facts[key]
        facts = learn(self.renderer, tools, kwargs, self.markers)
        if facts.sure:
            self._facts[key] = facts
        return facts

    def _key(self, tools: Any, kwargs: dict[str, Any]) -> str:
        return json.dumps([bool(tools), kwargs], sort_keys=True, default=str)

    def _encode(self, conversation: Conversation, trained: list[int], media: list[Placed]) -> list[Sample]:
        messages, facts = conversation.messages, self.facts(conversation.tools, conversation.kwargs)
        answers = [n for n in trained if messages[n]["role"] == "assistant"]
        turns = [find_turn(conversation, n, facts, self.markers) for n in answers]
        whole = conversation.text(len(messages))
        closing = turns[-1] if turns and turns[-1].index == len(messages) - 1 and turns[-1].appended else None
        if closing:
            whole = closing.text
        inside = [turn for turn in turns if whole.startswith(turn.text[: turn.end])]
        samples = []
        shown = [medium for placed in media for medium in placed]
        notes = [note for turn in inside for note in turn.notes]
        if inside and self._differs(conversation, inside):
            notes.append("generation-marks")
        appended = closing.appended if closing else None
        if self.config.loss == "all":
            samples.append(
                self._sample(conversation, whole, self._all(conversation, whole, inside), trained, appended, notes, shown)
            )
        elif inside:
            pieces = [piece for turn in inside for piece in self._pieces(messages, turn)]
            samples.append(self._sample(conversation, whole, pieces, [turn.index for turn in inside], appended, notes, shown))
        for turn in turns:
            if turn not in inside:
                own = ["own-sample", *turn.notes]
                pieces, seen = self._pieces(messages, turn), [m for placed in media[: turn.index + 1] for m in placed]
                samples.append(self._sample(conversation, turn.text, pieces, [turn.index], turn.appended, own, seen))
        return samples

    def _pieces(self, messages: list[Row], turn: Turn) -> list[Piece]:
        piece = (turn.hole, turn.end, message_weight(messages[turn.index]))
        return by_regex(turn.text, piece, self.spans) if self.spans else [piece]

    def _all(self, conversation: Conversation, whole: str, inside: list[Turn]) -> list[Piece]:
        """The whole text; what a message says has that message's weight, and an answer is weighed to its end marker."""
        pieces: list[Piece] = [(0, len(whole), 1.0)]
        ends = {turn.index: (turn.hole, turn.end) for turn in inside}
        for index, message in enumerate(conversation.messages):
            weight = message_weight(message)
            span = ends.get(index)
            if weight != 1.0:
                start, end = span or self._part(conversation, index)
                pieces = overlay(pieces, (start, end, weight))
            if span and self.spans:
                for piece in by_regex(whole, (*span, weight), self.spans):
                    pieces = overlay(pieces, piece)
        return pieces

    def _part(self, conversation: Conversation, index: int) -> tuple[int, int]:
        """Where the whole text has what a message says."""
        variant, _ = disguised(conversation.messages[index])
        whole = conversation.text(len(conversation.messages))
        other = conversation.renderer.render(
            [*conversation.formed[:index], conversation.form(variant), *conversation.formed[index + 1 :]],
            conversation.tools, conversation.kwargs,
        )  # fmt: skip
        start = common_prefix(whole, other)
        return start, max(start, len(whole) - common_suffix(whole, other))

    def _differs(self, conversation: Conversation, inside: list[Turn]) -> bool:
        """Whether the template's own `{% generation %}` marks say otherwise than the rule."""
        marks = conversation.marks()
        if marks is None:
            return False
        whole = conversation.text(len(conversation.messages))
        marked = {(start, start + len(whole[start:end].rstrip())) for start, end in marks}
        return any((turn.start, turn.end) not in marked and (turn.hole, turn.end) not in marked for turn in inside)

    def _sample(
        self,
        conversation: Conversation,
        text: str,
        pieces: list[Piece],
        turns: list[int],
        appended: str | None,
        notes: list[str],
        shown: Placed,
    ) -> Sample:
        if not getattr(self.tokenizer, "is_fast", False):
            raise RequestError(
                "the mask needs a fast tokenizer, one with a tokenizer.json: this one tells no offsets of its tokens"
            )
        if self.media is not None:
            ids, weights, media = self.media.encode(text, shown, pieces)
        else:
            ids, offsets = with_offsets(self.tokenizer, text)
            weights, media = token_weights(offsets, pieces), {}
        return Sample(
            ids, weights, turns=turns, text=text, spans=trained_spans(pieces), appended=appended,
            kwargs=dict(conversation.kwargs), notes=notes, media=media,
        )  # fmt: skip

    def prompt(self, messages: list[Row], tools: list[Any] | None = None, **kwargs: Any) -> list[int]:
        """Ids of the rendering with the generation prompt, as inference starts from it. With a sample's `kwargs` it is
        what stands before the sample's last answer. Media are left out; `inputs` has them."""
        text = self.prompt_text(messages, tools, **kwargs)
        encoded = self.tokenizer(text, add_special_tokens=False) if self.media is None else self.media.tokens(text)
        return list(encoded["input_ids"])

    def prompt_text(self, messages: list[Row], tools: list[Any] | None = None, **kwargs: Any) -> str:
        """The rendering with the generation prompt."""
        messages, kwargs = standard(messages), {**self.config.kwargs, **kwargs}
        faults = []
        for form in forms(messages):
            try:
                return Conversation(self.renderer, messages, tools, kwargs, form).text(len(messages), prompt=True)
            except Refused as err:
                faults.append(err)
        raise ValueError(str(faults[0]))

    def asked(self, row: Row, count: int) -> tuple[list[Row], Sample]:
        """A row's messages with bare media parts, and the prompt that its first `count` are, as a sample of which nothing is
        trained: `text` as rendered, `input_ids` with the places of its media filled. What answers it may be added to its ids.
        Raises ValueError."""
        messages, placed = self.collect(self.grounded(row))
        text = self.prompt_text(messages[:count], row.get("tools"), **(row.get("chat_template_kwargs") or {}))
        shown = [medium for found in placed[:count] for medium in found]
        if self.media is None:
            ids, media = list(self.tokenizer(text, add_special_tokens=False)["input_ids"]), {}
        else:
            ids, _, media = self.media.encode(text, shown, [])
        return messages, Sample(ids, [0.0] * len(ids), text=text, media=media)

    def inputs(
        self, messages: list[Row], media: dict[str, list[Any]] | None = None, tools: list[Any] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """What a model's generate takes for one prompt: input_ids and attention_mask [1, T], and the tensors of its media.

        media: as in a row, `{"images": [...]}`, for parts that hold no reference themselves. Raises ValueError.
        """
        shown, placed = self.collect({"messages": messages, **(media or {})})
        text = self.prompt_text(shown, tools, **kwargs)
        if self.media is None:
            return dict(self.tokenizer(text, add_special_tokens=False, return_tensors="pt"))
        return self.media.inputs(text, [medium for found in placed for medium in found])

    def batch(self, prompts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Several prompts as `inputs` gives them, padded on the left: what generate takes for all of them."""
        pad = self.tokenizer.pad_token_id or 0
        return padded_prompts(
            prompts, pad, self.media.extras if self.media else (), self.media.layout if self.media else Layout()
        )

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def stop_ids(self) -> list[int]:
        """The end-of-text token, and the tokens with which the template ends an answer and a tool call."""
        if self._stops is None:
            eos = self.tokenizer.eos_token_id
            ids = set(eos if isinstance(eos, list) else [eos]) - {None}
            question: Row = {"role": "user", "content": "a"}
            talks: list[tuple[list[Row], list[Any] | None]] = [
                ([question, {"role": "assistant", "content": "b"}], None),
                ([question, {"role": "assistant", "content": None, "tool_calls": [CALL]}], [TOOL]),
            ]
            for messages, tools in talks:
                ids |= self._ends(messages, tools)
            self._stops = sorted(ids)
        return list(self._stops)

    def _ends(self, messages: list[Row], tools: list[Any] | None) -> set[int]:
        """The last trained token of a conversation, where it is a whole end marker."""
        kwargs = self.kwargs_for(messages, tools, dict(self.config.kwargs))
        for form in forms(messages):
            try:
                conversation = Conversation(self.renderer, messages, tools, kwargs, form)
                turn = find_turn(conversation, 1, self.facts(tools, kwargs), self.markers)
            except Refused:
                continue
            markers = self.markers.all(turn.text, turn.start, turn.end)
            if markers and turn.text[: turn.end].endswith(markers[-1]):
                ids = self.tokenizer(markers[-1], add_special_tokens=False)["input_ids"]
                return set(ids) if len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id else set()
            return set()
        return set()

    @cached_property
    def answers(self) -> AnswerFormat:
        """How the chat template writes reasoning and tool calls, learnt from it on first use."""
        return learn_answers(self)

    def reader(self, prompt: Sequence[int], tools: list[Any] | None = None) -> Reader:
        """Reads one answer to a prompt's ids. Calls are looked for where there are tools."""
        return Reader(self.tokenizer, self.answers, prompt, tools, self.stop_ids())

    def call_grammar(
        self, tools: list[Any], name: str | None = None, many: bool = True, prompt: Sequence[int] | None = None
    ) -> str:
        """A Lark grammar of an answer that calls one of `tools`, or the one named; with `many`, as many calls as the format
        has room for. prompt: the ids that are answered, where their end may differ from that of the template's default.
        Raises RequestError for tools that cannot be called, or a name that none of them has."""
        end = None if prompt is None else str(self.tokenizer.decode(list(prompt)[-TAIL:], skip_special_tokens=False))
        return call_grammar(self.tokenizer, self.answers, tools, name, many, end)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        pad = self.tokenizer.pad_token_id or 0
        return collate_text(samples, pad) if self.media is None else self.media.collate(samples, pad)

    def pack(self, samples: Sequence[Sample], share: bool | Sequence[int] = False) -> Sample | None:
        return pack(samples, share)
