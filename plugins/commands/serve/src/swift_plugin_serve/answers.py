"""An answer as it grows: an engine's pieces become reasoning, content and tool calls, each token with what is told of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from swift_core.types import AnswerDelta, AnswerReader, Completion

from swift_plugin_serve.errors import ApiError
from swift_plugin_serve.tokens import Tokens


@dataclass(frozen=True)
class Scored:
    """A token with its log-probability, and the likeliest at its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Step:
    """What one piece of the engine's adds."""

    deltas: list[AnswerDelta]
    scored: list[Scored]
    finish: str | None = None
    ids: list[int] = field(default_factory=list)  # of the tokens that it adds


@dataclass
class Call:
    """A tool call, as far as it is known."""

    id: str
    name: str = ""
    arguments: str = ""


class Held:
    """A text without what may begin a stop string, until that is sure; after a stop string nothing comes."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops, self.kept, self.ended = list(stops), "", False

    def feed(self, text: str) -> str:
        if self.ended or not self.stops:
            return "" if self.ended else text
        whole = self.kept + text
        found = [whole.index(stop) for stop in self.stops if stop in whole]
        if found:
            self.kept, self.ended = "", True
            return whole[: min(found)]
        begun = max((n for stop in self.stops for n in range(1, len(stop)) if whole.endswith(stop[:n])), default=0)
        self.kept = whole[len(whole) - begun :]
        return whole[: len(whole) - begun]

    def close(self) -> str:
        rest, self.kept = self.kept, ""
        return rest


class Answer:
    """One choice. reader: the template's, where it has one; else the engine's text is the content.

    single: a second tool call ends the answer. told: log-probabilities were asked for. `done` tells that no further piece is
    needed.
    """

    def __init__(
        self, reader: AnswerReader | None, stops: Sequence[str], ident: Any, single: bool = False, told: bool = False
    ) -> None:
        self.reader, self.single, self._ident, self._told = reader, single, ident, told
        self.content, self.reasoning, self.calls = "", "", list[Call]()
        self.scored: list[Scored] = []
        self.ids: list[int] = []
        self.finish: str | None = None
        self.tokens = 0
        self.done = False
        self._text = ""
        self._held = {"content": Held(stops), "reasoning": Held(stops)} if reader is not None else {}

    def take(self, piece: Completion) -> Step:
        """Read a piece; the last one, with `finish`, holds the whole answer and adds what was not told yet. Raises ApiError
        where log-probabilities were asked for, and the engine has none."""
        if self._told and len(piece.logprobs) < len(piece.token_ids):
            raise ApiError(400, "logprobs: the engine gives no log-probabilities", code="unsupported", param="logprobs")
        last = piece.finish is not None
        skip = self.tokens if last else 0
        ids, scores, tops = piece.token_ids[skip:], piece.logprobs, piece.top_logprobs
        if len(scores) == len(piece.token_ids):
            told = scores[skip:], tops[skip:]
            scored = [Scored(token, told[0][n], tuple(told[1][n]) if n < len(told[1]) else ()) for n, token in enumerate(ids)]
        else:
            scored = []
        self.tokens = max(self.tokens, len(piece.token_ids)) if last else self.tokens + len(ids)
        deltas = self._read(piece, ids, last) if not self.done else []
        self.scored += scored
        self.ids += ids
        if last and self.finish is None:
            self.finish, self.done = "tool_calls" if self.calls and piece.finish == "stop" else piece.finish, True
        return Step(deltas, scored, self.finish if last else None, list(ids))

    def message(self) -> dict[str, Any]:
        """The answer so far as a message of the chat form; without calls its content is a text, if an empty one."""
        found: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            found["reasoning_content"] = self.reasoning
        if self.calls:
            found["content"] = self.content or None
            found["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.calls
            ]
        return found

    def _read(self, piece: Completion, ids: Sequence[int], last: bool) -> list[AnswerDelta]:
        if self.reader is None:
            text = piece.text
            if last:
                text = text[len(self._text) :] if text.startswith(self._text) else ""
            self._text += text
            return self._add([AnswerDelta(content=text)] if text else [])
        found = list(self.reader.feed(ids)) if ids else []
        if last:
            found += self.reader.close()
        deltas = self._add(self._without_stops(found))
        if last:
            rest = {name: held.close() for name, held in self._held.items()}
            deltas += self._add([AnswerDelta(**{name: text}) for name, text in rest.items() if text])
        return deltas

    def _without_stops(self, deltas: Sequence[AnswerDelta]) -> list[AnswerDelta]:
        """Deltas without a stop string: the engine ends at it, and the reader sees the tokens that complete it."""
        found = []
        for delta in deltas:
            if delta.call is None:
                delta = AnswerDelta(self._held["content"].feed(delta.content), self._held["reasoning"].feed(delta.reasoning))
            if delta.call is not None or delta.content or delta.reasoning:
                found.append(delta)
        return found

    def _add(self, deltas: Sequence[AnswerDelta]) -> list[AnswerDelta]:
        kept = []
        for delta in deltas:
            if delta.call is not None:
                if self.single and delta.call > 0:
                    self.finish, self.done = "tool_calls", True
                    break
                while len(self.calls) <= delta.call:
                    self.calls.append(Call(self._ident("call")))
                self.calls[delta.call].name += delta.name
                self.calls[delta.call].arguments += delta.arguments
            self.content += delta.content
            self.reasoning += delta.reasoning
            kept.append(delta)
        return kept


@dataclass
class Usage:
    """Tokens of a request: of each prompt once, and of all its answers."""

    prompts: dict[int, int] = field(default_factory=dict)
    cached: dict[int, int] = field(default_factory=dict)
    answers: int = 0
    drafted: int = 0  # tokens that the engine guessed, and of them those that were right
    accepted: int = 0

    def take(self, piece: Completion) -> None:
        if piece.finish is not None:
            self.drafted += piece.drafted
            self.accepted += piece.accepted
            self.prompts[piece.index] = max(piece.prompt_tokens, self.prompts.get(piece.index, 0))
            self.cached[piece.index] = max(piece.cached_tokens, self.cached.get(piece.index, 0))

    @property
    def prompt(self) -> int:
        return sum(self.prompts.values())

    def told(self) -> dict[str, Any]:
        guesses = {"accepted_prediction_tokens": self.accepted, "rejected_prediction_tokens": self.drafted - self.accepted}
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.answers,
            "total_tokens": self.prompt + self.answers,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached.values())},
            "completion_tokens_details": guesses,
        }


def name_of(tokens: Tokens, token: int, by_id: bool | None) -> str:
    """How a token is told: by its text, or as vLLM tells it by its id."""
    return f"token_id:{token}" if by_id else tokens.text(token)


def logprob_of(tokens: Tokens, scored: Scored, by_id: bool | None = None) -> dict[str, Any]:
    """OpenAI's form of a token's log-probability."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        # OpenAI's way of writing minus infinity, which JSON has not
        told = name_of(tokens, token, by_id)
        return {"token": told, "logprob": max(logprob, -9999.0), "bytes": list(tokens.bytes(token))}

    return one(scored.token, scored.logprob) | {"top_logprobs": [one(*pair) for pair in scored.top]}
