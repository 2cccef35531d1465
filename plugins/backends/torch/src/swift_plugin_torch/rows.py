"""What the scheduler keeps of a request: a call of `generate`, a prompt, and a row for each of its completions."""

from __future__ import annotations

import queue
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from swift_core.types import Completion, Request

from swift_plugin_torch.texts import Text


class Call:
    """One call of `generate`: where its completions go, and whether its reader is still there."""

    def __init__(self, stream: bool) -> None:
        self.stream, self.cancelled = stream, False
        self.results: queue.SimpleQueue[Completion | BaseException] = queue.SimpleQueue()

    def fail(self, err: BaseException) -> None:
        """End the call: its other rows are of no use to a reader who gets an error."""
        if not self.cancelled:
            self.cancelled = True
            self.results.put(err)


@dataclass(eq=False)
class Prompt:
    """A prompt, and what its first row computed for the others of the request's `n`."""

    ids: list[int]
    inputs: dict[str, torch.Tensor] | None = None  # of the model's generate: for prompts with media
    tokens: int = 0  # as the model counts them, the places of media filled
    waiting: int = 0  # rows that still need `states` and `logits`
    states: Any = None
    logits: torch.Tensor | None = None  # [1, V], of its last token
    cached: int = 0


@dataclass(frozen=True, eq=False)
class Guess:
    """A token that may come next."""

    token: int
    shares: torch.Tensor | None = None  # [V], the distribution that it was drawn from; None: it is only compared


@dataclass(eq=False)
class Row:
    """One completion while it is made."""

    call: Call
    index: int
    choice: int
    request: Request
    prompt: Prompt
    adapter: str | None
    stops: frozenset[int]  # token ids that end it
    text: Text
    random: random.Random
    matcher: Any = None  # of its constraint
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    told: int = 0  # tokens that went out in pieces
    finish: str | None = None
    cut: bool = False  # ended by a stop string, which its text ends before
    counts: torch.Tensor | None = None  # [V] how often each token was generated, for penalties
    seen: torch.Tensor | None = None  # [V] bool: tokens of prompt and answer
    guess: Guess | None = None  # of the token that is chosen next
    reach: int = 0  # guesses a pass that it has earned; 0: not known yet
    drafted: int = 0  # guesses that were checked
    accepted: int = 0  # of them, those that were right
    places: dict[tuple[int, ...], int] = field(default_factory=dict)  # where n-grams of it ended last, for guesses
    known: int = 0  # tokens of prompt and answer whose n-grams are in `places`

    @property
    def greedy(self) -> bool:
        return self.request.temperature < 1e-5

    @property
    def plain(self) -> bool:
        """Whether its token is simply the likeliest."""
        asked = self.request
        return (
            self.greedy and self.matcher is None and not asked.logit_bias and asked.repetition_penalty == 1
            and not asked.presence_penalty and not asked.frequency_penalty and len(self.ids) >= asked.min_tokens
        )  # fmt: skip

    @property
    def leads(self) -> bool:
        return self.choice == 0

    def accept(self, token: int, logprob: float, top: list[tuple[int, float]]) -> None:
        """Add a token; sets `finish` where it is the last."""
        self.ids.append(token)
        self.logprobs.append(logprob)
        if self.request.top_logprobs:
            self.top.append(top)
        if self.counts is not None:
            self.counts[token] += 1
        if self.seen is not None:
            self.seen[token] = True
        enough = len(self.ids) >= self.request.min_tokens
        if token in self.stops:
            self.finish = "stop" if enough or self.matcher is not None else None
        elif self.text.feed(token, enough):
            self.finish, self.cut = "stop", True
        if self.finish is None and self.matcher is not None and self.matcher.accept(token):
            self.finish = "stop"
        if self.finish is None and len(self.ids) >= self.request.max_tokens:
            self.finish = "length"

    def end(self, decode: Any, version: int) -> None:
        """Send the last piece, where pieces are asked for, and the whole completion."""
        text = self._whole(decode)
        if self.call.stream:
            self.text.close(text)
            self.send_piece(last=True)
        self.call.results.put(
            Completion(
                self.index, text, self.ids, self.logprobs, self.finish, self.prompt.tokens, version, self.choice, self.top,
                self.prompt.cached, drafted=self.drafted, accepted=self.accepted,
            )
        )  # fmt: skip

    def _whole(self, decode: Any) -> str:
        """The text, without what ended it."""
        if self.finish == "stop" and self.ids and self.ids[-1] in self.stops:
            return str(decode(self.ids[:-1]))
        return self.text.shown if self.cut else str(decode(self.ids))

    def send_piece(self, last: bool = False) -> None:
        """Send what is new, if anything can be shown."""
        text = self.text.take()
        if text or (last and self.told < len(self.ids)):
            new = slice(self.told, len(self.ids))
            self.told = len(self.ids)
            self.call.results.put(
                Completion(
                    self.index, text, self.ids[new], self.logprobs[new], prompt_tokens=self.prompt.tokens, choice=self.choice,
                    top_logprobs=self.top[new], cached_tokens=self.prompt.cached,
                )
            )  # fmt: skip
