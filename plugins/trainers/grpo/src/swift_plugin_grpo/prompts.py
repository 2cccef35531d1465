"""Prompts of on-policy training: what a row becomes, and which rows a step draws.

A row's prompt is rendered by the model's own template; an answer that the row ends with is left out of it, and stays in the row
for rewards and for mixed supervised training. Draws are numbered through the run, so that a seed and a number say everything.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from swift_core.errors import RequestError
from swift_core.source import asked_media
from swift_core.types import Row, Sample, Stream, Template

MEDIA = ("images", "videos", "audios")


class PromptForm:
    """Part `rows/prompts`: a sample of the prompt's ids, with the row in `label["row"]`, but for media: the sample has them."""

    def encode(self, template: Template, row: Row) -> list[Sample]:
        """Raises ValueError with the reason to refuse the row."""
        messages = question(row)
        kwargs = dict(row.get("chat_template_kwargs") or {})
        if hasattr(template, "asked"):
            shown, sample = template.asked({**row, **asked_media(row, len(messages))}, len(messages))
            row = {key: value for key, value in row.items() if key not in MEDIA} | {"messages": shown}
        else:
            if any(row.get(key) for key in MEDIA):
                raise ValueError("the row has media, and this template takes text only")
            sample = Sample(list(template.prompt(messages, row.get("tools"), **kwargs)), [])
        if not sample.input_ids:
            raise ValueError("the prompt is empty: there is no token to continue")
        # No token is trained. The weight of the last one says where the answer begins, as a row needs a place to learn at.
        sample.weights = [*[0.0] * (len(sample.input_ids) - 1), 1.0]
        sample.label, sample.kwargs = {"row": row}, kwargs
        return [sample]


def question(row: Row) -> list[Row]:
    """The row's messages without the answer that they may end with. Raises ValueError where none are left."""
    messages = list(row.get("messages") or [])
    while messages and messages[-1].get("role") == "assistant":
        messages.pop()
    if not any(message.get("role") != "system" for message in messages):
        raise ValueError("the row asks nothing: messages need one of another role than system and assistant")
    return messages


@dataclass(frozen=True, slots=True)
class Prompt:
    """A drawn row. `number` counts draws through the run, all ranks together. `text` and `media` are of a prompt with media."""

    number: int
    ids: list[int]
    row: Row
    text: str = ""
    media: dict[str, list[Any]] = field(default_factory=dict)


class Prompts:
    """Endless draws from the prepared prompts: a pure function of the number, in another order each epoch."""

    def __init__(self, samples: Any, seed: int, shuffle: bool = True) -> None:
        """Raises RequestError for a stream, and where there is no prompt."""
        if isinstance(samples, Stream):
            raise RequestError("stream: on-policy training takes prompts that are prepared whole; set stream=false")
        if not len(samples):
            raise RequestError("dataset: there is no prompt to train on; data/issues.jsonl gives the reasons")
        self.samples, self.seed, self.shuffle = samples, seed, shuffle
        self._epoch, self._order = -1, range(0)

    def __len__(self) -> int:
        return len(self.samples)

    def draw(self, numbers: Sequence[int]) -> list[Prompt]:
        """The prompts of these numbers."""
        return [self._drawn(number) for number in numbers]

    def _drawn(self, number: int) -> Prompt:
        epoch, place = divmod(number, len(self.samples))
        if self.shuffle and epoch != self._epoch:
            order = list(range(len(self.samples)))
            random.Random(f"{self.seed}-prompts-{epoch}").shuffle(order)
            self._epoch, self._order = epoch, order  # type: ignore[assignment]
        sample = self.samples[self._order[place] if self.shuffle else place]
        row = {**sample.label["row"], **sample.media}
        return Prompt(number, list(sample.input_ids), row, sample.text if sample.media else "", sample.media)
