"""The application: every path, its request and its answers. `make_app` takes any engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from swift_plugin_serve import chat, metrics, replies, schemas
from swift_plugin_serve.errors import ApiError, Json, invalid, respond
from swift_plugin_serve.limits import Limits
from swift_plugin_serve.served import Served
from swift_plugin_serve.sse import ClientGone, Events, while_there

GONE = 499  # nginx's status for a client that went away; nobody receives it
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": replies.Error, "description": text}
    for status, text in {
        400: "The request is wrong; the message says what", 401: "An API key is needed", 403: "Not allowed here",
        404: "No such model or path", 413: "The body is too large", 415: "The body is not JSON",
        429: "Too many requests; see Retry-After", 503: "The engine failed, or the server ends", 504: "It took too long",
    }.items()
}  # fmt: skip
STREAM = {"text/event-stream": {"schema": {"type": "string", "description": "Server-sent events, with stream: true"}}}


def make_app(served: Served) -> Any:
    """An ASGI application over `served`."""
    from swift_core import __version__

    app = FastAPI(title="swift-core serve", version=__version__, docs_url=None, redoc_url=None, separate_input_output_schemas=False)
    app.state.served = served
    _errors(app, served)
    _plain(app, served)
    _chat(app, served)
    _describe(app, bool(served.settings.keys))
    if served.settings.cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(served.settings.cors), allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"], expose_headers=["X-Request-Id", "Retry-After"],
        )  # fmt: skip
    return Limits(app, served)


def _errors(app: FastAPI, served: Served) -> None:
    @app.exception_handler(ApiError)
    async def told(request: Request, err: ApiError) -> Response:
        return respond(err)

    @app.exception_handler(RequestValidationError)
    async def wrong(request: Request, err: RequestValidationError) -> Response:
        field = getattr(request.scope.get("route"), "body_field", None)
        known = getattr(getattr(field, "field_info", None), "annotation", None)
        return respond(invalid(err.errors(), list(getattr(known, "model_fields", ()))))

    @app.exception_handler(HTTPException)
    async def http(request: Request, err: HTTPException) -> Response:
        texts = {404: f"no path {request.url.path}", 405: f"{request.url.path} does not take {request.method}"}
        message = texts.get(err.status_code, str(err.detail))
        return respond(ApiError(err.status_code, message, headers=dict(err.headers or {})))

    @app.exception_handler(ClientGone)
    async def gone(request: Request, err: ClientGone) -> Response:
        served.metrics.cancelled.inc()
        return Response(status_code=GONE)


def _plain(app: FastAPI, served: Served) -> None:
    @app.get("/health", responses={503: ERRORS[503]}, response_model=replies.Health)
    async def health() -> Any:
        """Whether the server takes requests."""
        if served.admission.closed:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        return Json(
            {"status": "ok", "model": served.name, "running": served.admission.running, "waiting": served.admission.waiting}
        )

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, 401: ERRORS[401]})
    async def told() -> Response:
        """For Prometheus."""
        return Response(served.metrics.text(), media_type=metrics.TYPE)

    @app.get("/v1/models", response_model=replies.ModelList, responses={401: ERRORS[401]})
    async def models() -> Any:
        """The model and its adapters, each by the name that requests call it."""
        return Json({"object": "list", "data": [_model(served, name) for name in served.names()]})

    @app.get("/v1/models/{model:path}", response_model=replies.ModelReply, responses={n: ERRORS[n] for n in (401, 404)})
    async def model(model: str) -> Any:
        served.adapter(model)
        return Json(_model(served, model))


def _model(served: Served, name: str) -> dict[str, Any]:
    return {
        "id": name, "object": "model", "created": served.created, "owned_by": "swift-core",
        "parent": None if name == served.name else served.name, "max_model_len": served.context,
        "capabilities": sorted(served.capabilities),
    }  # fmt: skip


def _chat(app: FastAPI, served: Served) -> None:
    @app.post(
        "/v1/chat/completions", response_model=replies.ChatReply,
        responses=ERRORS | {200: {"content": STREAM, "description": "The answer"}},
    )  # fmt: skip
    async def chat_completions(body: schemas.ChatRequest, request: Request) -> Any:
        """Answer messages."""
        raw = await request.json()
        state = request.scope["state"]

        async def answered() -> Response:
            asked = await asyncio.to_thread(chat.prepare, served, body, raw)
            under_way = await chat.begun(served, asked, state["arrived"])
            report = _reporter(served, request, body.model, bool(body.stream), under_way)
            if not body.stream:
                try:
                    return Json(await chat.whole(served, body, under_way))
                finally:
                    report()
            steps = under_way.steps()
            try:
                first = await anext(steps)  # before the status goes out, so that an error has its own
            except BaseException:
                report()
                raise
            return Events(_reported(chat.events(served, body, under_way, first, steps), report), served.metrics.cancelled.inc)

        return await while_there(request, answered())


def _reporter(served: Served, request: Request, model: str, stream: bool, under_way: Any) -> Callable[[], None]:
    """What ends a generation, and tells the log and the metrics of it."""

    def report() -> None:
        under_way.close()
        usage = under_way.usage
        served.metrics.prompt_tokens.labels(model).inc(usage.prompt)
        served.metrics.cached_tokens.labels(model).inc(sum(usage.cached.values()))
        served.metrics.answer_tokens.labels(model).inc(usage.answers)
        finish = [answer.finish for answer in under_way.answers]
        request.scope["state"]["told"] |= {
            "model": model, "stream": stream, "prompt_tokens": usage.prompt, "completion_tokens": usage.answers,
            "finish": finish if len(finish) > 1 else finish[0],
        }  # fmt: skip

    return report


async def _reported(events: Any, report: Callable[[], None]) -> Any:
    try:
        async for chunk in events:
            yield chunk
    finally:
        report()
        await events.aclose()


def _describe(app: FastAPI, keys: bool) -> None:
    """The OpenAPI description, told truly: a wrong body is 400 in OpenAI's form, never FastAPI's 422."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = make()
            for path in found["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                found["components"]["schemas"].pop(name, None)
            if keys:
                found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                found["security"] = [{"key": []}]
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
