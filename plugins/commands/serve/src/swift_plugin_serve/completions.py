"""POST /v1/completions: texts or token ids continued as they are, without the chat template."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from swift_core.types import Request

from swift_plugin_serve.answers import Answer, Scored, Step, Usage, name_of
from swift_plugin_serve.chat import ident
from swift_plugin_serve.errors import ApiError
from swift_plugin_serve.generation import Generation, called
from swift_plugin_serve.sampling import answer_room, check_least, check_length, constraint, penalised
from swift_plugin_serve.schemas import CompletionRequest
from swift_plugin_serve.served import Served
from swift_plugin_serve.sse import event, following, to_the_end
from swift_plugin_serve.tokens import Tokens

DEFAULT_TOKENS = 16  # OpenAI's


@dataclass(frozen=True)
class Prompted:
    """A completion request, ready for the engine: a request for each prompt, of which the best `keep` answers are given."""

    requests: list[Request]
    prompts: list[list[int]]
    texts: list[str]  # what echo writes before an answer
    keep: int


def prepare(served: Served, body: CompletionRequest) -> Prompted:
    """Blocks: tokenizes. Raises ApiError."""
    served.must_generate()
    if body.suffix:
        raise ApiError(400, "'suffix' is not supported: models here continue a text, they do not fill in", param="suffix")
    count, best = body.n or 1, body.best_of or body.n or 1
    if best < count:
        raise ApiError(400, f"best_of, {best}, is below n, {count}", param="best_of")
    if best > count and body.stream:
        raise ApiError(400, "best_of cannot be streamed: which is best is known at the end", param="best_of")
    if body.prompt_logprobs is not None and (body.echo or body.stream):
        raise ApiError(400, "prompt_logprobs goes without echo and stream", param="prompt_logprobs")
    name = "prompt_logprobs" if body.prompt_logprobs else "logprobs"
    if (body.prompt_logprobs or (body.echo and body.logprobs)) and not hasattr(served.engine, "likeliest"):
        message = f"this engine does not tell what is likeliest in a prompt; {name} may be 0"
        raise ApiError(400, message, code="unsupported", param=name)
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens 0 needs echo: there would be nothing to answer", param="max_tokens")
    given = body.prompt
    listed: list[Any] = list(given) if isinstance(given, list) and not isinstance(given[0], int) else [given]
    if len(listed) * best > served.settings.max_choices:
        raise ApiError(400, f"{len(listed) * best} answers are asked for: {served.settings.max_choices} at most at once")
    form, adapter = constraint(served, body.response_format, body.structured_outputs), served.adapter(body.model)
    prompts = [_ids(served, prompt) for prompt in listed]
    texts = [prompt if isinstance(prompt, str) else served.tokenizer.decode(prompt) for prompt in listed] if body.echo else []
    shared = penalised(body, served) | {"n": best}
    requests = [
        Request(
            token_ids=prompt, max_tokens=0 if body.max_tokens == 0 else answer_room(served, len(prompt), body.max_tokens,
                                                                                     DEFAULT_TOKENS),
            top_logprobs=body.logprobs or 0, constraint=form, adapter=adapter, **shared,
        )
        for prompt in prompts
    ]  # fmt: skip
    for request in requests:
        check_least(request.min_tokens, request.max_tokens)
    return Prompted(requests, prompts, texts, count)


def _ids(served: Served, prompt: Any) -> list[int]:
    tokens = served.tokenizer
    if isinstance(prompt, str):
        check_length(served, len(prompt))
        found = tokens.encode(prompt)
        if not found:
            raise ApiError(400, "the prompt is empty, and this model has no token that begins a text", param="prompt")
        return found
    if far := next((token for token in prompt if token >= tokens.count), None):
        raise ApiError(400, f"prompt: no token {far}; there are {tokens.count}", param="prompt")
    return list(prompt)


@dataclass
class Completions:
    """A completion request under way."""

    served: Served
    body: CompletionRequest
    asked: Prompted
    arrived: float
    usage: Usage = field(default_factory=Usage)

    def __post_init__(self) -> None:
        per = self.asked.requests[0].n
        told = self.body.logprobs is not None
        self.answers = [Answer(None, (), ident, told=told) for _ in range(len(self.asked.requests) * per)]
        self.usage.prompts = {n: len(prompt) for n, prompt in enumerate(self.asked.prompts)}
        self.generation = Generation(self.served, self.asked.requests, self.arrived)
        self.scored: list[list[Scored]] = []  # of the prompts' tokens where they are asked for; the first has no score
        self.only_scored = self.asked.requests[0].max_tokens == 0

    async def start(self) -> None:
        if (self.body.echo and self.body.logprobs is not None) or self.body.prompt_logprobs is not None:
            self.scored = await called(self.served, self._score)
        if not self.only_scored:
            await self.generation.start()

    def _score(self) -> list[list[Scored]]:
        """Blocks: asks the engine for what it says of the prompts."""
        prompts, adapter, engine = self.asked.prompts, self.asked.requests[0].adapter, self.served.engine
        scores, count = engine.logprobs(prompts, adapter), self.body.prompt_logprobs or self.body.logprobs
        tops = engine.likeliest(prompts, count, adapter) if count else [[[]] * len(row) for row in scores]  # type: ignore[attr-defined]
        return [
            [
                Scored(ids[0], 0.0),
                *(Scored(token, score, tuple(top)) for token, score, top in zip(ids[1:], row, likeliest, strict=True)),
            ]
            for ids, row, likeliest in zip(prompts, scores, tops, strict=True)
        ]

    async def steps(self) -> AsyncIterator[tuple[int, Step]]:
        """(answer, what a piece adds). Raises ApiError."""
        if self.only_scored:
            for n, answer in enumerate(self.answers):
                answer.finish, answer.done = "length", True
                yield n, Step([], [], "length")
            return
        per = self.asked.requests[0].n
        async for piece in self.generation:
            number = piece.index * per + piece.choice
            if 0 <= number < len(self.answers):
                self.usage.take(piece)
                yield number, self.answers[number].take(piece)
            if all(answer.done for answer in self.answers):
                break
        if lacking := [n for n, answer in enumerate(self.answers) if not answer.done]:
            raise ApiError(503, f"the engine ended without answer {lacking[0]}", code="engine_error")
        self.usage.answers = sum(answer.tokens for answer in self.answers)

    def close(self) -> None:
        self.usage.answers = sum(answer.tokens for answer in self.answers)
        self.generation.close()

    def best(self) -> list[tuple[int, Answer]]:
        """(prompt, answer): of each prompt the answers that are given, the likeliest a token first where more were made."""
        per, found = self.asked.requests[0].n, []
        for prompt in range(len(self.asked.requests)):
            made = self.answers[prompt * per : (prompt + 1) * per]
            if self.asked.keep < per:
                made = sorted(made, key=_mean, reverse=True)[: self.asked.keep]
            found += [(prompt, answer) for answer in made]
        return found

    def echoed(self, prompt: int) -> tuple[str, list[Scored]]:
        """What stands before an answer: the prompt's text, and its tokens where they are scored."""
        return (self.asked.texts[prompt], self.scored[prompt] if self.scored else []) if self.body.echo else ("", [])


def _mean(answer: Answer) -> float:
    if answer.tokens and not answer.scored:
        raise ApiError(503, "the engine gave no log-probabilities, by which best_of chooses", code="engine_error")
    return sum(one.logprob for one in answer.scored) / max(1, len(answer.scored))


def _head(body: CompletionRequest) -> dict[str, Any]:
    return {
        "id": ident("cmpl"), "object": "text_completion", "created": int(time.time()), "model": body.model,
        "system_fingerprint": None,
    }  # fmt: skip


def legacy(
    tokens: Tokens, scored: list[Scored], top: bool, start: int, unscored: int = 0, by_id: bool | None = None
) -> dict[str, Any]:
    """OpenAI's older form of log-probabilities. unscored: so many tokens at the beginning have none. The token that stands in
    a place is among the likeliest there, even where it is none of them."""
    texts, offsets = [tokens.text(one.token) for one in scored], []
    for text in texts:
        offsets.append(start)
        start += len(text)

    def likeliest(one: Scored) -> dict[str, float]:
        # Of two tokens with one text the likelier is told: it comes first
        found: dict[str, float] = {}
        for token, logprob in (*one.top, (one.token, one.logprob)):
            found.setdefault(name_of(tokens, token, by_id), max(logprob, -9999.0))
        return found

    return {
        "tokens": [name_of(tokens, one.token, by_id) for one in scored],
        "token_logprobs": [None if n < unscored else max(one.logprob, -9999.0) for n, one in enumerate(scored)],
        "top_logprobs": [None if n < unscored else likeliest(one) for n, one in enumerate(scored)] if top else None,
        "text_offset": offsets,
    }


def told_of_prompt(tokens: Tokens, scored: list[Scored], count: int) -> list[dict[str, Any] | None]:
    """vLLM's form: for each place but the first, its own token and the `count` likeliest there, by id."""
    return [
        {
            str(token): {"logprob": max(logprob, -9999.0), "decoded_token": tokens.text(token)}
            for token, logprob in ((one.token, one.logprob), *one.top[:count])
        }
        if n
        else None
        for n, one in enumerate(scored)
    ]


async def whole(served: Served, body: CompletionRequest, asked: Completions) -> dict[str, Any]:
    async with aclosing(asked.steps()) as steps:
        async for _ in steps:
            pass
    choices = []
    for n, (prompt, answer) in enumerate(asked.best()):
        text, before = asked.echoed(prompt)
        logprobs = None
        if body.logprobs is not None:
            scored, by_id = [*before, *answer.scored], body.return_tokens_as_token_ids
            logprobs = legacy(served.tokenizer, scored, bool(body.logprobs), 0, 1 if before else 0, by_id)
        choice = {"index": n, "text": text + answer.content, "logprobs": logprobs, "finish_reason": answer.finish}
        if body.return_token_ids:
            choice |= {"token_ids": answer.ids, "prompt_token_ids": asked.asked.prompts[prompt]}
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = told_of_prompt(served.tokenizer, asked.scored[prompt], body.prompt_logprobs)
        choices.append(choice)
    return {**_head(body), "choices": choices, "usage": asked.usage.told()}


def events(
    served: Served, body: CompletionRequest, asked: Completions, first: tuple[int, Step], rest: Any
) -> AsyncGenerator[bytes, None]:
    """The answers as they grow. `first` is the first step, made before the response began, `rest` the others."""
    return to_the_end(_grown(served, body, asked, first, rest), partial(served.log.fault, None))


async def _grown(
    served: Served, body: CompletionRequest, asked: Completions, first: tuple[int, Step], rest: Any
) -> AsyncGenerator[bytes, None]:
    head, usage = _head(body), bool(body.stream_options and body.stream_options.include_usage)
    extra: dict[str, Any] = {"usage": None} if usage else {}
    per, lengths = asked.asked.requests[0].n, dict[int, int]()
    step: tuple[int, Step] | None = first
    while step is not None:
        number, added = step
        before: list[Scored] = []
        text = "".join(delta.content for delta in added.deltas)
        if number not in lengths:
            lengths[number] = 0
            begun, before = asked.echoed(number // per)
            text = begun + text
        logprobs = None
        if body.logprobs is not None and (added.scored or before):
            scored = [*before, *added.scored]
            unscored, by_id = 1 if before else 0, body.return_tokens_as_token_ids
            logprobs = legacy(served.tokenizer, scored, bool(body.logprobs), lengths[number], unscored, by_id)
        lengths[number] += len(text)
        if text or logprobs or added.finish or (body.return_token_ids and added.ids):
            one: dict[str, Any] = {"index": number, "text": text, "logprobs": logprobs, "finish_reason": added.finish}
            one |= {"token_ids": added.ids} if body.return_token_ids else {}
            yield event({**head, "choices": [one], **extra})
        step = await following(rest)
    if usage:
        yield event({**head, "choices": [], "usage": asked.usage.told()})
