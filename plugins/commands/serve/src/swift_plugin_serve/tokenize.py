"""/tokenize and /detokenize: a text or a conversation as token ids, and back."""

from __future__ import annotations

from typing import Any

from swift_plugin_serve.errors import ApiError
from swift_plugin_serve.messages import standard
from swift_plugin_serve.sampling import check_length, template_kwargs
from swift_plugin_serve.schemas import DetokenizeRequest, TokenizeRequest
from swift_plugin_serve.served import Served


def tokenize(served: Served, body: TokenizeRequest, raw: dict[str, Any]) -> dict[str, Any]:
    """Blocks. Messages come with the prompt that makes the model answer. Raises ApiError."""
    if body.model is not None:
        served.adapter(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give a prompt or messages, one of the two")
    tokens = served.tokenizer
    if body.prompt is not None:
        if body.tools or body.chat_template_kwargs:
            raise ApiError(400, "tools and chat_template_kwargs belong to messages; there is a prompt")
        check_length(served, len(body.prompt))
        ids = tokens.encode(body.prompt, body.add_special_tokens is not False)
    else:
        if body.add_special_tokens is not None:
            raise ApiError(400, "add_special_tokens belongs to a prompt: messages have those of the chat template")
        messages, _ = standard(raw["messages"])
        try:
            ids = served.template.prompt(messages, raw.get("tools"), **template_kwargs(body.chat_template_kwargs))
        except TypeError as err:
            raise ApiError(400, f"chat_template_kwargs: {err}", param="chat_template_kwargs") from err
        except ValueError as err:
            raise ApiError(400, " ".join(str(err).split())) from err
    found: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": served.context}
    return found | ({"token_strs": [tokens.text(token) for token in ids]} if body.return_token_strs else {})


def detokenize(served: Served, body: DetokenizeRequest) -> dict[str, Any]:
    if body.model is not None:
        served.adapter(body.model)
    tokens = served.tokenizer
    if far := next((token for token in body.tokens if token >= tokens.count), None):
        raise ApiError(400, f"tokens: no token {far}; there are {tokens.count}", param="tokens")
    return {"prompt": tokens.decode(body.tokens)}
