"""What a client is told when something is wrong: OpenAI's error form, the right status, one clear message."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from fastapi.responses import JSONResponse
from swift_core.errors import RequestError, SwiftError, did_you_mean, one_line

KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 413: "invalid_request_error", 415: "invalid_request_error", 429: "rate_limit_error",
    500: "server_error", 503: "server_error", 504: "timeout_error",
}  # fmt: skip
REFUSED = {
    "functions": "use 'tools'", "function_call": "use 'tool_choice'", "audio": "answers are text",
    "web_search_options": "there is no web search here", "reasoning_effort": "give 'chat_template_kwargs' what the model's "
    "chat template has for it", "reasoning": "give 'chat_template_kwargs' what the model's chat template has for it",
    "verbosity": "say in a message how long an answer should be",
    "conversation": "use 'previous_response_id'", "prompt": "stored prompts are not kept here; use 'input' or 'messages'",
    "background": "a response is answered at once", "max_tool_calls": "there are no built-in tools here",
}  # fmt: skip
"""Fields of OpenAI's that would change the answer, and are not served."""


FIELD = re.compile(r"(?!(?:str|int|float|bool|dict|list|nullable|literal|constrained-str)$)[a-z_]+")
"""Parts of a fault's place that are names of fields; others name a branch of a type."""


class ApiError(Exception):
    """An answer with a status of 400 or more. The message is one line."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def text_of(value: Any) -> str:
    """JSON without needless blanks."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


class Json(JSONResponse):
    """JSON that may hold any text, also one that UTF-8 cannot write."""

    def render(self, content: Any) -> bytes:
        return text_of(content).encode("utf-8", "replace")


def respond(err: ApiError) -> Json:
    return Json(err.body(), err.status, headers=err.headers)


def failure(err: BaseException) -> ApiError:
    """What an engine or a template raised, for the client: 400 where the request is at fault, else 503."""
    if isinstance(err, ApiError):
        return err
    if isinstance(err, (RequestError, ValueError)):
        return ApiError(400, " ".join(str(err).split()) or type(err).__name__)
    told = getattr(err, "brief", None) or str(err)  # an engine's log is for the server's, not for its clients
    text = " ".join(told.split()) if isinstance(err, SwiftError) else one_line(err)
    return ApiError(503, f"the engine failed: {text}", code="engine_error")


def invalid(errors: Sequence[Any], known: Sequence[str] = ()) -> ApiError:
    """What a body's validation found, as one message about its first fault."""
    first = min(errors, key=_rank)
    if first["type"] == "literal_error":  # of a union: what each of its branches takes
        alike = [one for one in errors if one["type"] == "literal_error" and _place(one) == _place(first)]
        same = dict.fromkeys(one["ctx"]["expected"] for one in alike)
        first = first | {"msg": f"Input should be {' or '.join(same)}"}
    place = _place(first)
    param = ".".join(place)
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}", code="invalid_json")
    if first["type"] == "missing" and not place:
        return ApiError(400, "the body is empty: a JSON object is expected")
    if first["type"] == "extra_forbidden":
        name = str(first["loc"][-1])  # any text may be a field's name
        place.append(name)
        param = ".".join(place)
        if len(place) == 1 and name in REFUSED:
            return ApiError(400, f"{name!r} is not supported: {REFUSED[name]}", code="unsupported_parameter", param=param)
        hint = did_you_mean(name, known) if len(place) == 1 else ""
        return ApiError(400, f"unknown field {param!r}.{hint}", code="unknown_parameter", param=param)
    if first["type"] == "missing":
        return ApiError(400, f"{param} is missing", code="missing_required_parameter", param=param)
    reason = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param}: {reason}" if param else reason, code="invalid_value", param=param or None)


def _place(error: Any) -> list[str]:
    """Names and numbers that lead to a fault; an unknown field's own name may be any text, and is left out."""
    inside = error["loc"][1:-1] if error["type"] == "extra_forbidden" else error["loc"][1:]
    return [str(part) for part in inside if isinstance(part, int) or FIELD.fullmatch(part)]


def _rank(error: Any) -> tuple[int, int, int]:
    """The most telling fault first: an unknown field, then what lies deepest, then a list that holds nothing."""
    unknown = error["type"] == "extra_forbidden"
    depth = len(_place(error)) + unknown
    return (0 if unknown and len(error["loc"]) == 2 else 1, -depth, 0 if error["type"] == "too_short" else 1)
