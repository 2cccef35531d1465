"""POST /v1/responses: OpenAI's newer form. An input and what went before become messages; the answer becomes items."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from swift_core.types import Request, Row

from swift_plugin_serve.answers import Step
from swift_plugin_serve.chat import Asked, Chat, finished, ident
from swift_plugin_serve.errors import ApiError
from swift_plugin_serve.items import Items
from swift_plugin_serve.messages import Media, reference
from swift_plugin_serve.sampling import constraint, sampling, template_kwargs
from swift_plugin_serve.schemas import Allowed, NamedTool, ResponsesRequest
from swift_plugin_serve.served import Served
from swift_plugin_serve.sse import event, following
from swift_plugin_serve.store import Stored
from swift_plugin_serve.tools import offer


@dataclass(frozen=True)
class Conversed(Asked):
    """A response that is asked for. talk: the messages without the instructions, which the next response has to give anew."""

    talk: list[Row] = field(default_factory=list)


def stored(served: Served, name: str) -> Stored:
    found = served.store.get(name)
    if found is None:
        raise ApiError(404, f"response {name!r} is not kept here: it was never, or others took its room", code="not_found")
    return found


def prepare(served: Served, body: ResponsesRequest, raw: dict[str, Any]) -> Conversed:
    """Blocks: renders and tokenizes. Raises ApiError."""
    served.must_generate()
    before = stored(served, body.previous_response_id) if body.previous_response_id else None
    media: Media = {key: list(items) for key, items in before.media.items()} if before else {}
    talk = [*(before.messages if before else ()), *messages_of(raw["input"], media)]
    if not talk:
        raise ApiError(400, "input: it holds no message", param="input")
    head: list[Row] = [{"role": "system", "content": body.instructions}] if body.instructions else []
    form = constraint(served, _form(body), None)
    tools = [
        {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}} for tool in raw.get("tools") or ()
    ]
    offered = offer(served, tools, _choice(body), body.parallel_tool_calls, form)
    scored = bool(body.include)
    if body.top_logprobs and not scored:
        raise ApiError(400, "top_logprobs needs include: ['message.output_text.logprobs']", param="top_logprobs")
    if scored:
        served.tokenizer  # noqa: B018  (says why, where there is none)
    request = Request(
        messages=[*head, *talk], media=media, tools=offered.tools, constraint=form,
        adapter=served.adapter(body.model), top_logprobs=body.top_logprobs or 0, seed=body.seed,
        stop=[body.stop] if isinstance(body.stop, str) else list(body.stop or ()),
        template_kwargs=template_kwargs(body.chat_template_kwargs), **sampling(body),
    )  # fmt: skip
    asked = finished(served, request, offered, body.max_output_tokens)
    return Conversed(asked.request, asked.offer, asked.prompt, scored, asked.note, talk)


def _form(body: ResponsesRequest) -> Any:
    """`text.format` in the form of `response_format`."""
    from swift_plugin_serve.schemas import JsonSchemaFormat

    given = body.text.format if body.text else None
    if given is None or given.type != "json_schema":
        return given
    return JsonSchemaFormat.model_validate(
        {"type": "json_schema", "json_schema": {"name": given.name, "schema": given.schema_}}
    )


def _choice(body: ResponsesRequest) -> Any:
    choice = body.tool_choice
    if choice is None or isinstance(choice, str):
        return choice
    if choice.type == "function":
        return NamedTool.model_validate({"type": "function", "function": {"name": choice.name}})
    tools = [{"type": "function", "function": {"name": tool.name}} for tool in choice.tools]
    return Allowed.model_validate({"type": "allowed_tools", "allowed_tools": {"mode": choice.mode, "tools": tools}})


def messages_of(given: Any, media: Media) -> list[Row]:
    """An input's items as messages; their media are added to `media`. Calls join the assistant's message before them."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    found: list[Row] = []
    reasoning = ""
    for n, item in enumerate(given):
        kind, place = item.get("type") or "message", f"input.{n}"
        if kind == "reasoning":
            reasoning += "".join(part.get("text") or "" for part in item.get("content") or ())
            continue
        if kind == "function_call_output":
            content = _content(item["output"], media, f"{place}.output")
            found.append({"role": "tool", "tool_call_id": item["call_id"], "content": content})
            continue
        if kind == "function_call":
            function = {"name": item["name"], "arguments": item["arguments"]}
            if not found or found[-1]["role"] != "assistant":
                found.append({"role": "assistant", "content": None})
            found[-1].setdefault("tool_calls", []).append({"id": item["call_id"], "type": "function", "function": function})
        else:
            role = "system" if item["role"] == "developer" else item["role"]
            found.append({"role": role, "content": _content(item["content"], media, f"{place}.content")})
        if reasoning and found[-1]["role"] == "assistant":
            found[-1]["reasoning_content"], reasoning = reasoning, ""
    return found


def _content(content: Any, media: Media, place: str) -> Any:
    if isinstance(content, str):
        return content
    parts: list[Row] = []
    for n, part in enumerate(content):
        if part["type"] == "input_image":
            if not part.get("image_url"):
                raise ApiError(400, f"{place}.{n}: image_url is missing; files are not kept here", param=f"{place}.{n}")
            media.setdefault("images", []).append(reference(part["image_url"], f"{place}.{n}.image_url"))
            parts.append({"type": "image"})
        elif part["type"] == "input_audio":
            sound = part.get("input_audio") or {}
            if not sound:
                raise ApiError(400, f"{place}.{n}: input_audio is missing", param=f"{place}.{n}")
            media.setdefault("audios", []).append(f"data:audio/{sound['format']};base64,{sound['data']}")
            parts.append({"type": "audio"})
        else:
            parts.append({"type": "text", "text": part.get("text") or part.get("refusal") or ""})
    if all(part["type"] == "text" for part in parts):
        return "\n".join(part["text"] for part in parts)
    return parts


class Writer:
    """A response as it grows."""

    def __init__(self, served: Served, body: ResponsesRequest, chat: Chat) -> None:
        self.served, self.body, self.chat = served, body, chat
        self.id, self.created = ident("resp"), int(time.time())
        self.items = Items(ident)

    def response(self, status: str, error: ApiError | None = None, usage: bool = False) -> dict[str, Any]:
        body = self.body
        return {
            "id": self.id, "object": "response", "created_at": self.created, "status": status,
            "error": {"code": "server_error", "message": error.message} if error else None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions, "max_output_tokens": body.max_output_tokens, "model": body.model,
            "output": self.items.items, "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id, "reasoning": {"effort": None, "summary": None},
            "store": body.store is not False, "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": body.text.model_dump(by_alias=True, exclude_none=True) if body.text else {"format": {"type": "text"}},
            "tool_choice": body.model_dump(include={"tool_choice"})["tool_choice"] or "auto",
            "tools": [tool.model_dump() for tool in body.tools or ()], "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p, "truncation": "disabled", "metadata": body.metadata or {},
            "usage": self.usage() if usage else None,
        }  # fmt: skip

    def usage(self) -> dict[str, Any]:
        told, reasoning = self.chat.usage.told(), self.chat.answers[0].reasoning
        thought = len(self.served.tokens.encode(reasoning, False)) if reasoning and self.served.tokens else 0
        return {
            "input_tokens": told["prompt_tokens"], "input_tokens_details": told["prompt_tokens_details"],
            "output_tokens": told["completion_tokens"], "output_tokens_details": {"reasoning_tokens": thought},
            "total_tokens": told["total_tokens"],
        }  # fmt: skip

    def take(self, step: Step) -> list[dict[str, Any]]:
        answer, tokens = self.chat.answers[0], self.served.tokens
        scored = step.scored if self.body.include else []
        return self.items.take(step.deltas, [call.id for call in answer.calls], scored, tokens)

    def ended(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The last events, and the whole response, which is kept."""
        status = "incomplete" if self.chat.answers[0].finish == "length" else "completed"
        last = self.items.close(status)
        whole = self.response(status, usage=True)
        if self.body.store is not False:
            assert isinstance(self.chat.asked, Conversed)
            talk = [*self.chat.asked.talk, self.chat.answers[0].message()]
            self.served.store.add(self.id, whole, talk, self.chat.asked.request.media)
        return last, whole


async def whole(served: Served, body: ResponsesRequest, chat: Chat) -> dict[str, Any]:
    writer = Writer(served, body, chat)
    async with aclosing(chat.steps()) as steps:
        async for _, step in steps:
            writer.take(step)
    return writer.ended()[1]


async def events(
    served: Served, body: ResponsesRequest, chat: Chat, first: tuple[int, Step], rest: Any
) -> AsyncGenerator[bytes, None]:
    """OpenAI's events, each with its name and its number."""
    writer, count = Writer(served, body, chat), 0

    def told(kind: str, **fields: Any) -> bytes:
        nonlocal count
        count += 1
        return event({"type": kind, "sequence_number": count - 1, **fields}, kind)

    yield told("response.created", response=writer.response("in_progress"))
    yield told("response.in_progress", response=writer.response("in_progress"))
    try:
        step: tuple[int, Step] | None = first
        while step is not None:
            for made in writer.take(step[1]):
                yield told(**made)
            step = await following(rest)
        last, response = writer.ended()
        for made in last:
            yield told(**made)
        yield told(f"response.{response['status']}", response=response)
    except Exception as err:
        failed = err if isinstance(err, ApiError) else ApiError(500, "the server failed while it wrote this response")
        if failed is not err:
            served.log.fault(None, err)
        for made in writer.items.close("incomplete"):
            yield told(**made)
        yield told("response.failed", response=writer.response("failed", failed, usage=True))
        yield told("error", code=failed.code or "server_error", message=failed.message, param=failed.param)
