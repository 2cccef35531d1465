"""OpenAI's sampling options to those of an engine's request. Defaults are OpenAI's: temperature 1, top_p 1."""

from __future__ import annotations

import re
from typing import Any

from swift_core.types import Constraint

from swift_plugin_serve.errors import ApiError
from swift_plugin_serve.schemas import Penalised, Sampling, StructuredOutputs
from swift_plugin_serve.served import Served

TAKEN = {
    "self", "messages", "conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
    "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "sanitize_control_tokens", "tokenizer_kwargs", "processor_kwargs",
}  # fmt: skip
"""Arguments of rendering and of transformers' apply_chat_template that are none of a template's."""


def sampling(body: Sampling) -> dict[str, Any]:
    """The fields of a `Request` that all bodies may set."""
    return {
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "top_k": max(0, body.top_k or 0),
        "min_p": body.min_p or 0.0,
        "repetition_penalty": 1.0 if body.repetition_penalty is None else body.repetition_penalty,
        "min_tokens": body.min_tokens or 0,
        "ignore_eos": bool(body.ignore_eos),
        "stop_ids": list(body.stop_token_ids or ()),
    }


def penalised(body: Penalised, served: Served) -> dict[str, Any]:
    """Those that chat and completions may set. Raises ApiError."""
    stop = [body.stop] if isinstance(body.stop, str) else list(body.stop or ())
    bias = {int(token): float(value) for token, value in (body.logit_bias or {}).items()}
    if bias and served.tokens is not None:
        far = next((token for token in bias if token >= served.tokens.count), None)
        if far is not None:
            raise ApiError(400, f"logit_bias: no token {far}; there are {served.tokens.count}", param="logit_bias")
    return sampling(body) | {
        "frequency_penalty": body.frequency_penalty or 0.0,
        "presence_penalty": body.presence_penalty or 0.0,
        "logit_bias": bias,
        "seed": body.seed,
        "stop": [text for text in stop if text],
        "n": body.n or 1,
    }


def answer_room(served: Served, prompt: int, wanted: int | None, default: int | None = None) -> int:
    """Tokens that an answer may have after a prompt of so many. Raises ApiError where the model's context is too short."""
    context = served.context
    if context is None:
        return wanted if wanted is not None else default or 1024
    if prompt >= context:
        too_long(served, prompt)
    if wanted is None:
        return min(default or context, context - prompt)
    if prompt + wanted > context:
        message = f"the prompt has {prompt} tokens and {wanted} are asked for: {served.name} takes {context} together"
        raise ApiError(400, message, code="context_length_exceeded", param="max_tokens")
    return wanted


def template_kwargs(given: dict[str, Any] | None) -> dict[str, Any]:
    """What a request gives to the chat template's own switches. Raises ApiError for what is not the client's to set."""
    taken = sorted(TAKEN & set(given or ()))
    if taken:
        message = f"chat_template_kwargs: {taken[0]!r} is not a switch of the chat template; the server sets it"
        raise ApiError(400, message, param="chat_template_kwargs")
    return dict(given or {})


def check_least(least: int, most: int) -> None:
    """Refuse an answer that would have to be longer than it may be. Raises ApiError."""
    if least > most:
        raise ApiError(400, f"min_tokens, {least}, is above the {most} tokens that the answer may have", param="min_tokens")


def too_long(served: Served, prompt: int, about: str = "") -> None:
    message = f"the prompt has {about}{prompt} tokens, and {served.name} takes {served.context} with the answer"
    raise ApiError(400, message, code="context_length_exceeded", param="messages")


def check_length(served: Served, characters: int) -> None:
    """Refuse a text that cannot be short enough, before it is tokenized. Raises ApiError."""
    if served.context is not None and served.tokens is not None and characters > served.context * served.tokens.longest:
        too_long(served, characters // served.tokens.longest, "at least ")


def constraint(served: Served, form: Any, structured: StructuredOutputs | None) -> Constraint | None:
    """What `response_format` or `structured_outputs` demand. Raises ApiError."""
    found: list[Constraint] = []
    if form is not None and form.type == "json_object":
        found.append(Constraint("json_object"))
    elif form is not None and form.type == "json_schema":
        schema = form.json_schema.schema_
        if schema is None:
            place = "response_format.json_schema.schema"
            raise ApiError(400, f"{place} is missing", code="missing_required_parameter", param=place)
        found.append(Constraint("json_schema", schema))
    if structured is not None:
        given = {
            "json_schema": structured.json_, "regex": structured.regex, "choice": structured.choice,
            "grammar": structured.grammar,
        }  # fmt: skip
        held = [Constraint(kind, value) for kind, value in given.items() if value is not None]  # type: ignore[arg-type]
        if not held:
            raise ApiError(400, "structured_outputs: give one of json, regex, choice, grammar", param="structured_outputs")
        found += held
    if len(found) > 1:
        raise ApiError(400, "response_format and structured_outputs: give one form of the answer, not several")
    if not found:
        return None
    if found[0].kind == "regex":
        try:
            re.compile(found[0].value)
        except re.error as err:
            raise ApiError(400, f"structured_outputs.regex: {err}", param="structured_outputs.regex") from None
    served.needs("constraint", "an answer of a given form")
    return found[0]
