"""POST /v1/chat/completions: messages in, an answer out, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from uuid import uuid4

from swift_core.types import AnswerDelta, Request

from swift_plugin_serve.answers import Answer, Step, Usage, logprob_of
from swift_plugin_serve.errors import ApiError, failure
from swift_plugin_serve.generation import Generation
from swift_plugin_serve.messages import standard
from swift_plugin_serve.sampling import answer_room, check_least, check_length, constraint, penalised, template_kwargs
from swift_plugin_serve.schemas import ChatRequest
from swift_plugin_serve.served import Served
from swift_plugin_serve.sse import event, following, to_the_end
from swift_plugin_serve.tools import Offer, offer


def ident(kind: str) -> str:
    return f"{kind}-{uuid4().hex}" if kind in ("chatcmpl", "cmpl") else f"{kind}_{uuid4().hex}"


@dataclass(frozen=True)
class Asked:
    """A chat request, ready for the engine. prompt: the ids that are answered; None where no template is at hand. scored: its
    answer is told with log-probabilities. note: what the client should know, though it is no error."""

    request: Request
    offer: Offer
    prompt: list[int] | None
    scored: bool = False
    note: str | None = None


def prepare(served: Served, body: ChatRequest, raw: dict[str, Any]) -> Asked:
    """Blocks: renders and tokenizes. raw: the body as it was sent, whose tools keep their order. Raises ApiError."""
    served.must_generate()
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise ApiError(400, "max_tokens is the older name of max_completion_tokens: give one of the two", param="max_tokens")
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    if body.logprobs:
        served.tokenizer  # noqa: B018  (says why, where there is none)
    messages, media = standard(raw["messages"])
    form = constraint(served, body.response_format, body.structured_outputs)
    tools = offer(served, raw.get("tools"), body.tool_choice, body.parallel_tool_calls, form)
    wanted = body.max_completion_tokens or body.max_tokens
    request = Request(
        messages=messages, media=media, tools=tools.tools, constraint=form,
        adapter=served.adapter(body.model), top_logprobs=body.top_logprobs or 0,
        template_kwargs=template_kwargs(body.chat_template_kwargs), **penalised(body, served),
    )  # fmt: skip
    return replace(finished(served, request, tools, wanted), scored=bool(body.logprobs))


def finished(served: Served, request: Request, tools: Offer, wanted: int | None) -> Asked:
    """The request with the room of its answer, and its prompt's ids. Raises ApiError."""
    if any(request.media.values()):
        served.needs("media", f"{', '.join(request.media)} in a message")
    if served.opened.template is None:
        request.max_tokens = answer_room(served, 0, wanted)
        check_least(request.min_tokens, request.max_tokens)
        return Asked(request, tools, None)
    assert request.messages is not None
    check_length(served, sum(len(_text(message)) for message in request.messages))
    try:
        prompt = served.template.prompt(request.messages, request.tools, **request.template_kwargs)
    except TypeError as err:  # an argument of the template's that has another meaning here
        raise ApiError(400, f"chat_template_kwargs: {err}", param="chat_template_kwargs") from err
    except Exception as err:
        told = failure(err)
        raise ApiError(400, told.message) if told.status >= 500 else told from err
    request.max_tokens = answer_room(served, len(prompt), wanted)
    check_least(request.min_tokens, request.max_tokens)
    request.constraint = tools.constraint(served.template, prompt) or request.constraint
    return Asked(request, tools, prompt, note=_unseen(served, request, prompt))


def _unseen(served: Served, request: Request, prompt: list[int]) -> str | None:
    """A note, where the chat template renders the same with and without tools: the model does not know of them."""
    if not request.tools:
        return None
    if served.shows_tools is None:  # found once: it is the template's way
        assert request.messages is not None
        served.shows_tools = served.template.prompt(request.messages, None, **request.template_kwargs) != prompt
    return None if served.shows_tools else "the chat template does not show tools to the model"


def _text(message: dict[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content or ())


class Chat:
    """A chat request under way: an answer for each of its `n` choices."""

    def __init__(self, served: Served, asked: Asked, arrived: float) -> None:
        self.served, self.asked = served, asked
        self.generation = Generation(served, [asked.request], arrived)
        self.answers = [self._answer() for _ in range(asked.request.n)]
        self.usage = Usage({0: len(asked.prompt or ())})

    def _answer(self) -> Answer:
        asked = self.asked
        make = getattr(self.served.opened.template, "reader", None)
        reader = make(asked.prompt, asked.request.tools) if make is not None and asked.prompt is not None else None
        return Answer(reader, asked.request.stop, ident, asked.offer.single, asked.scored)

    async def steps(self) -> AsyncIterator[tuple[int, Step]]:
        """(choice, what a piece adds), until all choices are done. Raises ApiError."""
        async for piece in self.generation:
            if not 0 <= piece.choice < len(self.answers):
                continue
            answer = self.answers[piece.choice]
            self.usage.take(piece)
            step = answer.take(piece)
            if step.finish is None and answer.done:  # ended here, before the engine's own end
                step = replace(step, finish=answer.finish)
            yield piece.choice, step
            if all(answer.done for answer in self.answers):
                break
        if lacking := [n for n, answer in enumerate(self.answers) if not answer.done]:
            raise ApiError(503, f"the engine ended without an answer to choice {lacking[0]}", code="engine_error")
        self.usage.answers = sum(answer.tokens for answer in self.answers)

    def close(self) -> None:
        self.usage.answers = sum(answer.tokens for answer in self.answers)
        self.generation.close()


async def begun(served: Served, asked: Asked, arrived: float) -> Chat:
    """A chat request whose place is taken. Raises ApiError."""
    chat = await asyncio.to_thread(Chat, served, asked, arrived)  # a template learns its own form when it first reads
    await chat.generation.start()
    return chat


def _head(kind: str, served: Served, body: ChatRequest) -> dict[str, Any]:
    return {
        "id": ident("chatcmpl"), "object": kind, "created": int(time.time()), "model": body.model,
        "system_fingerprint": None,
    }  # fmt: skip


async def whole(served: Served, body: ChatRequest, chat: Chat) -> dict[str, Any]:
    """The answer at once."""
    async with aclosing(chat.steps()) as steps:
        async for _ in steps:
            pass
    choices = []
    for n, answer in enumerate(chat.answers):
        message = {**answer.message(), "refusal": None}
        logprobs = _logprobs(served, answer.scored, body) if body.logprobs else None
        ids = {"token_ids": answer.ids} if body.return_token_ids else {}
        choices.append({"index": n, "message": message, "logprobs": logprobs, "finish_reason": answer.finish, **ids})
    prompt = {"prompt_token_ids": chat.asked.prompt} if body.return_token_ids else {}
    return {**_head("chat.completion", served, body), "choices": choices, "usage": chat.usage.told(), **prompt}


def _logprobs(served: Served, scored: list[Any], body: ChatRequest) -> dict[str, Any]:
    by_id = body.return_tokens_as_token_ids
    return {"content": [logprob_of(served.tokenizer, one, by_id) for one in scored], "refusal": None}


def events(served: Served, body: ChatRequest, chat: Chat, first: tuple[int, Step], rest: Any) -> AsyncGenerator[bytes, None]:
    """The answer as it grows. `first` is the first step, made before the response began, `rest` the others."""
    return to_the_end(_grown(served, body, chat, first, rest), partial(served.log.fault, None))


async def _grown(
    served: Served, body: ChatRequest, chat: Chat, first: tuple[int, Step], rest: Any
) -> AsyncGenerator[bytes, None]:
    head, usage = _head("chat.completion.chunk", served, body), bool(body.stream_options and body.stream_options.include_usage)
    extra: dict[str, Any] = {"usage": None} if usage else {}
    begun: set[int] = set()

    def chunk(
        choice: int, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None, ids: list[int] | None = None
    ) -> bytes:
        one: dict[str, Any] = {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        one |= {"token_ids": ids or []} if body.return_token_ids else {}
        return event({**head, "choices": [one], **extra})

    step: tuple[int, Step] | None = first
    while step is not None:
        number, added = step
        if number not in begun:
            begun.add(number)
            yield chunk(number, {"role": "assistant", "content": ""})
        logprobs = _logprobs(served, added.scored, body) if body.logprobs and added.scored else None
        ids = added.ids if body.return_token_ids else None
        pieces = [_delta(chat.answers[number], delta) for delta in added.deltas]
        if (logprobs is not None or ids) and not pieces:
            pieces = [{}]  # tokens that show nothing are told all the same
        for n, delta in enumerate(pieces):
            yield chunk(number, delta, logprobs=logprobs if n == 0 else None, ids=ids if n == 0 else None)
        if added.finish is not None:
            yield chunk(number, {}, added.finish)
        step = await following(rest)
    if usage:
        yield event({**head, "choices": [], "usage": chat.usage.told()})


def _delta(answer: Answer, delta: AnswerDelta) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if delta.content:
        found["content"] = delta.content
    if delta.reasoning:
        found["reasoning_content"] = delta.reasoning
    if delta.call is not None:
        call: dict[str, Any] = {"index": delta.call, "function": {"arguments": delta.arguments}}
        if delta.name:
            call |= {"id": answer.calls[delta.call].id, "type": "function"}
            call["function"] = {"name": delta.name, "arguments": delta.arguments}
        found["tool_calls"] = [call]
    return found
