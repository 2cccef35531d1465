"""A request as the JSON that servers take, and their JSON as completions: pure functions and one accumulator.

Dialect `openai` is what api.openai.com documents; `vllm` has what vLLM, SGLang and `swift-core serve` take besides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from swift_core.errors import CapabilityError, RequestError, RunError
from swift_core.types import Completion, Request, Row

from swift_plugin_openai.messages import outgoing

DEFAULTS = Request()
BEYOND = {  # of a request, what dialect vllm has and OpenAI has not
    "min_tokens": "min_tokens", "top_k": "top_k", "min_p": "min_p", "repetition_penalty": "repetition_penalty",
    "stop_ids": "stop_token_ids", "ignore_eos": "ignore_eos", "template_kwargs": "chat_template_kwargs",
}  # fmt: skip
STRUCTURED = {"json_schema": "json", "json_object": "json_object", "regex": "regex", "choice": "choice", "grammar": "grammar"}


@dataclass(frozen=True)
class Dialect:
    """What a server takes. `limit` is its name of max_tokens in chat; `logprobs`: ask for them with every answer."""

    beyond: bool = False
    limit: str = "max_tokens"
    logprobs: bool = False


def body(request: Request, model: str, dialect: Dialect, stream: bool) -> tuple[str, dict[str, Any]]:
    """The path below `/v1`, and the JSON. Raises CapabilityError for what the dialect lacks."""
    if request.token_ids is None and not request.messages:
        raise RequestError("the request has neither messages nor token ids")
    chat = request.token_ids is None
    sent: dict[str, Any] = {"model": model, "stream": stream, "temperature": request.temperature, "top_p": request.top_p}
    sent[dialect.limit if chat else "max_tokens"] = request.max_tokens
    if stream:
        sent["stream_options"] = {"include_usage": True}
    for name in ("n", "presence_penalty", "frequency_penalty", "seed", "stop"):
        if getattr(request, name) != getattr(DEFAULTS, name):
            sent[name] = getattr(request, name)
    if request.logit_bias:
        sent["logit_bias"] = {str(token): bias for token, bias in request.logit_bias.items()}
    for name, sent_as in BEYOND.items():
        if getattr(request, name) == getattr(DEFAULTS, name) or (name == "template_kwargs" and not chat):
            continue
        if not dialect.beyond:
            raise CapabilityError(f"{name} is not of OpenAI's API; where the server takes it: engine.dialect=vllm")
        sent[sent_as] = getattr(request, name)
    if dialect.beyond:
        sent |= {"return_token_ids": True, "return_tokens_as_token_ids": True}
    sent |= _logprobs(request, dialect, chat) | _constraint(request, dialect, chat)
    if chat:
        sent["messages"] = outgoing(request.messages or [], request.media)
        if request.tools:
            sent["tools"] = request.tools
        return "/chat/completions", sent
    if any(request.media.values()):
        raise CapabilityError("media go with messages; the request has token ids")
    return "/completions", sent | {"prompt": list(request.token_ids or [])}


def _logprobs(request: Request, dialect: Dialect, chat: bool) -> dict[str, Any]:
    if not (request.top_logprobs or dialect.logprobs or dialect.beyond):
        return {}
    if not chat:
        return {"logprobs": request.top_logprobs}
    return {"logprobs": True} | ({"top_logprobs": request.top_logprobs} if request.top_logprobs else {})


def _constraint(request: Request, dialect: Dialect, chat: bool) -> dict[str, Any]:
    wanted = request.constraint
    if wanted is None:
        return {}
    if not (chat or dialect.beyond):
        raise CapabilityError(f"constraint {wanted.kind}: OpenAI's API has it for messages, not for token ids")
    if wanted.kind == "json_schema":
        schema = {"name": "answer", "schema": wanted.value, "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}
    if wanted.kind == "json_object":
        return {"response_format": {"type": "json_object"}}
    if not dialect.beyond:
        raise CapabilityError(
            f"constraint {wanted.kind}: OpenAI's API has json_schema and json_object; where the server takes it: "
            "engine.dialect=vllm"
        )
    return {"structured_outputs": {STRUCTURED[wanted.kind]: wanted.value}}


@dataclass
class Answer:
    """One choice of one request, as it comes."""

    index: int  # of its request
    choice: int
    text: str = ""
    reasoning: str = ""
    calls: list[Row] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    told: list[Any] = field(default_factory=list)  # log-probabilities as the server tells them, tokens by their text
    finish: str | None = None

    def add(self, choice: Mapping[str, Any]) -> Completion:
        """Take in one choice of an event or of a whole answer; the piece that it adds."""
        delta: Mapping[str, Any] = choice.get("delta") or choice.get("message") or {}
        text = (choice.get("text") if "text" in choice else delta.get("content")) or ""
        self.text += text
        self.reasoning += delta.get("reasoning_content") or delta.get("reasoning") or ""
        for number, call in enumerate(delta.get("tool_calls") or ()):
            self._call(call.get("index", number), call)
        ids = list(choice.get("token_ids") or ())
        logprobs, top = self._read_logprobs(choice.get("logprobs"), ids)
        self.ids += ids
        self.logprobs += logprobs
        self.top += top
        if finish := choice.get("finish_reason"):
            self.finish = "stop" if finish in ("tool_calls", "function_call", "stop") else str(finish)
        return Completion(self.index, text, ids, logprobs, choice=self.choice, top_logprobs=top)

    def whole(self, usage: Mapping[str, Any] | None) -> Completion:
        """The finished completion. Raises RunError where the server never ended this choice."""
        if self.finish is None:
            raise RunError("the server ended its answer without a finish_reason")
        usage = usage or {}
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        message: Row = {"role": "assistant", "content": self.text}
        message |= {"reasoning_content": self.reasoning} if self.reasoning else {}
        message |= {"tool_calls": self.calls} if self.calls else {}
        message |= {"logprobs": self.told} if self.told and not self.ids else {}
        return Completion(
            self.index, self.text, self.ids, self.logprobs, self.finish, usage.get("prompt_tokens") or 0, choice=self.choice,
            top_logprobs=self.top, cached_tokens=cached, message=message,
        )  # fmt: skip

    def _call(self, number: int, piece: Mapping[str, Any]) -> None:
        while len(self.calls) <= number:
            self.calls.append({"id": None, "type": "function", "function": {"name": "", "arguments": ""}})
        call, function = self.calls[number], piece.get("function") or {}
        call["id"] = piece.get("id") or call["id"]
        call["function"]["name"] += function.get("name") or ""
        call["function"]["arguments"] += function.get("arguments") or ""

    def _read_logprobs(
        self, told: Mapping[str, Any] | None, ids: list[int]
    ) -> tuple[list[float], list[list[tuple[int, float]]]]:
        """Log-probabilities of a choice's tokens in either API's form, and those of the likeliest where they have ids."""
        if not told:
            return [], []
        if told.get("content") is not None:  # chat
            entries = told["content"]
            self.told += entries
            values = [entry["logprob"] for entry in entries]
            likeliest = [{top["token"]: top["logprob"] for top in entry.get("top_logprobs") or ()} for entry in entries]
        else:
            values = list(told.get("token_logprobs") or ())
            likeliest = [dict(top or {}) for top in told.get("top_logprobs") or ()]
            self.told += [
                {"token": token, "logprob": value, "top_logprobs": [{"token": t, "logprob": p} for t, p in top.items()]}
                for token, value, top in zip(told.get("tokens") or (), values, likeliest or [{}] * len(values), strict=False)
            ]
        if not ids:
            return values, []
        return values, [top for top in map(_numbered, likeliest) if top]


def _numbered(likeliest: Mapping[str, float]) -> list[tuple[int, float]]:
    """`{"token_id:5": -0.1}` as ids, the likeliest first; nothing where tokens are told by their text."""
    found = [(int(token[9:]), value) for token, value in likeliest.items() if token.startswith("token_id:")]
    return sorted(found, key=lambda pair: -pair[1]) if len(found) == len(likeliest) else []


Scored = tuple[float, list[tuple[int, float]]]
"""A log-probability, and those of the likeliest ids in the same place, the likeliest first."""


def echoed(choice: Mapping[str, Any], ids: Sequence[int]) -> list[Scored]:
    """Of each id of a prompt but the first, what the server tells. Raises CapabilityError where it does not."""
    found: list[Scored] = []
    if (prompt := choice.get("prompt_logprobs")) is not None:
        for token, entry in zip(ids[1:], prompt[1 : len(ids)], strict=False):
            told = {int(key): float(value["logprob"]) for key, value in (entry or {}).items()}
            if token in told:
                found.append((told[token], sorted(told.items(), key=lambda pair: -pair[1])))
    else:
        values = list((choice.get("logprobs") or {}).get("token_logprobs") or ())[1 : len(ids)]
        found = [(float(value), []) for value in values if value is not None]
    if len(found) != len(ids) - 1:
        raise CapabilityError("the server does not tell the log-probabilities of a prompt (echo with logprobs)")
    return found
