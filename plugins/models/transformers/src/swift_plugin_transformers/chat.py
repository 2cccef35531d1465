"""The `checkpoint` template: the checkpoint's own chat template renders training rows, byte for byte as for inference.

The mask needs no marks in the template. For an assistant turn, X is the rendering up to and with it, P the rendering before
it with the generation prompt: training starts where P ends, and ends where X and its continuation part ways.
The text is tokenized once, whole; character spans map to tokens by offsets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from swift_core.errors import RequestError
from swift_core.types import Batch, Row, Sample

from swift_plugin_transformers.collation import collate, pack
from swift_plugin_transformers.config import ChatTemplateConfig

MARKER = re.compile(r"<[^<>\s]{1,48}>|\[/?[A-Z_]{2,32}\]")
OURS = ("train", "weight")  # keys of a message that are for us, not for the template


@dataclass(frozen=True)
class Turn:
    """Where one assistant turn is trained: characters [start, end) of `text`, the rendering up to it."""

    index: int
    text: str
    start: int
    end: int
    weight: float
    appended: str | None
    notes: tuple[str, ...]


class ChatTemplate:
    """Renders and masks rows with a tokenizer's chat template."""

    def __init__(self, tokenizer: Any, config: ChatTemplateConfig) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.source: str | None = None
        if config.file:
            try:
                self.source = Path(config.file).read_text(encoding="utf-8")
            except OSError as err:
                raise RequestError(f"template.file: {config.file} cannot be read: {err.strerror}") from None
        elif not getattr(tokenizer, "chat_template", None):
            raise RequestError("this checkpoint ships no chat template; give one with template.file=FILE.jinja")

    def render(self, messages: list[Row], tools: Any = None, prompt: bool = False, **kwargs: Any) -> str:
        """The template's text. Tool arguments are objects; a template that refuses them gets strings."""
        plain = [{key: value for key, value in message.items() if key not in OURS} for message in messages]
        for message in plain:
            message["content"] = message.get("content") or ""  # null beside tool calls: some templates print "None" for it
        options = {"tools": tools or None, "tokenize": False, "add_generation_prompt": prompt, "chat_template": self.source}
        try:
            return str(self.tokenizer.apply_chat_template(plain, **options, **kwargs))
        except (TemplateError, TypeError) as err:
            if any(message.get("tool_calls") for message in plain):
                try:
                    return str(self.tokenizer.apply_chat_template(_string_arguments(plain), **options, **kwargs))
                except (TemplateError, TypeError):
                    pass
            raise ValueError(f"the chat template refuses the row: {' '.join(str(err).split())}") from None

    def encode(self, row: Row) -> list[Sample]:
        """The samples of a row: one with all turns that stand in the whole text as they were rendered, and one for each
        turn that does not. Raises ValueError with the reason to refuse the row."""
        messages, tools = row["messages"], row.get("tools")
        kwargs = {**self.config.kwargs, **row.get("chat_template_kwargs", {})}
        wanted = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        turns = [self._turn(messages, n, tools, kwargs) for n in (wanted[-1:] if self.config.turns == "last" else wanted)]
        turns = [turn for turn in turns if turn.weight]
        if not turns:
            raise ValueError("the row has no trainable token: no assistant message with content, or train: false on all")
        whole = self.render(messages, tools, **kwargs)
        inside = [turn for turn in turns if turn.appended is None and whole.startswith(turn.text[: turn.end])]
        samples = [self._sample(whole, inside, kwargs)] if inside else []
        for turn in turns:
            if turn not in inside:
                samples.append(self._sample(turn.text, [turn], kwargs, () if turn.appended else ("own-sample",)))
        return samples

    def _turn(self, messages: list[Row], index: int, tools: Any, kwargs: dict[str, Any]) -> Turn:
        message, notes = messages[index], []
        text = self.render(messages[: index + 1], tools, **kwargs)
        prompt = self.render(messages[:index], tools, prompt=True, **kwargs) if index else ""
        start = len(prompt)
        if not text.startswith(prompt):
            start = _parting(text, prompt)
            notes.append("prompt-mismatch")
        after = self._continued(messages[: index + 1], tools, kwargs)
        shared = _shared(text, after)
        end = len(text[:shared].rstrip())
        content_end = _content_end(text, message, start)
        appended = None
        if end <= content_end:
            end = len(text.rstrip())
        if end <= content_end or (message.get("tool_calls") and not self._closes(tools, kwargs)):
            end = len(text.rstrip())
            marker = MARKER.search(after, _place(text[:end], after))
            if marker is None:
                raise ValueError(f"message {index}: the chat template writes no end marker after the answer")
            appended = marker.group()
            text = text[:end] + appended
            end = len(text)
        weight = float(message.get("weight", 1.0)) if message.get("train", True) else 0.0
        return Turn(index, text, start, end, weight, appended, tuple(notes))

    def _continued(self, messages: list[Row], tools: Any, kwargs: dict[str, Any]) -> str:
        """The rendering with one more message: a call's result, where the template takes it, else the user's."""
        for call in (messages[-1].get("tool_calls") or [])[:1]:
            result = {"role": "tool", "content": "x", "name": call["function"]["name"], "tool_call_id": call.get("id", "")}
            try:
                return self.render([*messages, result], tools, **kwargs)
            except ValueError:
                break
        return self.render([*messages, {"role": "user", "content": "x"}], tools, **kwargs)

    def _closes(self, tools: Any, kwargs: dict[str, Any]) -> bool:
        """Whether the template itself writes an end marker after an answer."""
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            return self._turn(probe, 1, tools, kwargs).appended is None
        except ValueError:
            return True

    def _sample(self, text: str, turns: list[Turn], kwargs: dict[str, Any], notes: Sequence[str] = ()) -> Sample:
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        weights = [
            next((turn.weight for turn in turns if turn.start <= begin < turn.end and finish > begin), 0.0)
            for begin, finish in encoded["offset_mapping"]
        ]
        return Sample(
            list(encoded["input_ids"]), weights, turns=[turn.index for turn in turns], text=text,
            spans=[(turn.start, turn.end) for turn in turns], appended=next((t.appended for t in turns if t.appended), None),
            kwargs=kwargs, notes=[*notes, *(note for turn in turns for note in turn.notes)],
        )  # fmt: skip

    def prompt(self, messages: list[Row], tools: list[Any] | None = None, **kwargs: Any) -> list[int]:
        """Ids of the rendering with the generation prompt, as inference starts from it."""
        text = self.render(messages, tools, prompt=True, **{**self.config.kwargs, **kwargs})
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def stop_ids(self) -> list[int]:
        """The end-of-text token, and the token with which the template ends an assistant turn."""
        probe = self.encode({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})[0]
        last = max(n for n, weight in enumerate(probe.weights) if weight)
        ids = {probe.input_ids[last]} if probe.input_ids[last] in self.tokenizer.all_special_ids else set()
        return sorted(ids | ({self.tokenizer.eos_token_id} - {None}))

    def collate(self, samples: Sequence[Sample]) -> Batch:
        return collate(samples, self.tokenizer.pad_token_id or 0)

    def pack(self, samples: Sequence[Sample]) -> Sample | None:
        return pack(samples)


def _shared(text: str, other: str) -> int:
    """Length of the common prefix, moved back to the start of a marker that it would cut."""
    length = next((n for n, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    for whole in (text, other):
        for marker in MARKER.finditer(whole, max(0, length - 64)):
            if marker.start() < length < marker.end():
                length = marker.start()
    return length


def _parting(text: str, prompt: str) -> int:
    """Where an answer begins whose rendering does not begin with its prompt: after the prompt's last header if that comes
    later, else where the two part ways."""
    shared = _shared(text, prompt)
    header = prompt[max((marker.start() for marker in MARKER.finditer(prompt)), default=len(prompt)) :]
    found = text.find(header, shared) if header else -1
    return shared if found < 0 else found + len(header)


def _place(text: str, after: str) -> int:
    """Where the end of `text` stands in `after`, which may render what comes before it differently."""
    for length in range(min(len(text), 256), 0, -1):
        found = after.rfind(text[-length:])
        if found >= 0:
            return found + length
    return len(after)


def _content_end(text: str, message: Row, start: int) -> int:
    """Where the message's content and tool calls end in `text`. Raises ValueError when the template leaves them out."""
    content = message.get("content") or ""
    parts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    parts += [call["function"]["name"] for call in message.get("tool_calls") or []]
    end = start
    for part in (part.strip() for part in parts if part.strip()):  # a call may come without text
        found = text.rfind(part, start)
        if found < 0:
            raise ValueError(f"the chat template leaves out what the assistant says: {part[:40]!r}")
        end = max(end, found + len(part))
    return end


def _string_arguments(messages: list[Row]) -> list[Row]:
    changed = []
    for message in messages:
        calls = message.get("tool_calls")
        if calls:
            calls = [
                {
                    **call,
                    "function": {
                        **call["function"],
                        "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
                    },
                }
                for call in calls
            ]
            message = {**message, "tool_calls": calls}
        changed.append(message)
    return changed
