"""The application: every path, its request and its answers. `make_app` takes any engine."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from swift_plugin_serve import adapters, chat, completions, heads, metrics, replies, responses, schemas, tokenize
from swift_plugin_serve.errors import ApiError, Json, invalid, respond, text_of
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

    app = FastAPI(
        title="swift-core serve", version=__version__, docs_url=None, redoc_url=None, separate_input_output_schemas=False
    )
    app.state.served = served
    app.router.route_class = Checked
    _errors(app, served)
    _plain(app, served)
    if served.settings.page:
        _page(app)
    _generating(app, served)
    _responses(app, served)
    _heads(app, served)
    _tokens(app, served)
    _adapters(app, served)
    _describe(app, bool(served.settings.keys))
    return Limits(app, served)


class Checked(APIRoute):
    """A route that refuses texts which are none: JSON may write half of a surrogate pair, and no tokenizer takes it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        inner = super().get_route_handler()

        async def checked(request: Request) -> Response:
            body = await request.body() if request.method == "POST" else b""
            if b"\\ud" in body.lower():
                try:
                    text_of(json.loads(body)).encode()
                except UnicodeEncodeError:
                    raise ApiError(400, "a text holds half of a surrogate pair", code="invalid_value") from None
                except (ValueError, RecursionError):
                    pass  # no JSON: told by the inner handler
            return await inner(request)

        return checked


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
        code = "too_large" if err.status_code == 413 else None
        return respond(ApiError(err.status_code, message, code=code, headers=dict(err.headers or {})))

    @app.exception_handler(Exception)
    async def fault(request: Request, err: Exception) -> Response:
        served.log.fault(request.scope["state"]["ident"], err)
        return respond(ApiError(500, "the server failed on this request; its log says where"))

    @app.exception_handler(ClientGone)
    async def gone(request: Request, err: ClientGone) -> Response:
        served.metrics.cancelled.inc()
        return Response(status_code=GONE)


def _page(app: FastAPI) -> None:
    """The chat page at `/`. Its policy lets it run its own script alone, and speak to this server alone."""
    text = (Path(__file__).parent / "page" / "index.html").read_text(encoding="utf-8")

    def digest(tag: str) -> str:
        inside = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert inside is not None, f"the page has no {tag}"
        return f"'sha256-{base64.b64encode(hashlib.sha256(inside[1].encode()).digest()).decode()}'"

    headers = {
        "Content-Security-Policy": f"default-src 'none'; script-src {digest('script')}; style-src {digest('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache",
    }  # fmt: skip

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(text, media_type="text/html", headers=headers)


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


def _generating(app: FastAPI, served: Served) -> None:
    streamed: dict[int | str, dict[str, Any]] = ERRORS | {200: {"content": STREAM, "description": "The answer"}}

    @app.post("/v1/chat/completions", response_model=replies.ChatReply, responses=streamed)
    async def chat_completions(body: schemas.ChatRequest, request: Request) -> Any:
        """Answer messages."""
        raw = await request.json()

        async def start() -> chat.Chat:
            asked = await asyncio.to_thread(chat.prepare, served, body, raw)
            return await chat.begun(served, asked, request.scope["state"]["arrived"])

        return await while_there(request, _answered(served, request, body, start, chat))

    @app.post("/v1/completions", response_model=replies.CompletionReply, responses=streamed)
    async def completion(body: schemas.CompletionRequest, request: Request) -> Any:
        """Continue a text or token ids."""

        async def start() -> completions.Completions:
            asked = await asyncio.to_thread(completions.prepare, served, body)
            under_way = completions.Completions(served, body, asked, request.scope["state"]["arrived"])
            await under_way.start()
            return under_way

        return await while_there(request, _answered(served, request, body, start, completions))


def _responses(app: FastAPI, served: Served) -> None:
    streamed: dict[int | str, dict[str, Any]] = ERRORS | {200: {"content": STREAM, "description": "The response"}}

    @app.post("/v1/responses", response_model=replies.ResponseReply, responses=streamed)
    async def respond_to(body: schemas.ResponsesRequest, request: Request) -> Any:
        """Answer an input, and keep the conversation for `previous_response_id`."""
        raw = await request.json()

        async def start() -> chat.Chat:
            asked = await asyncio.to_thread(responses.prepare, served, body, raw)
            return await chat.begun(served, asked, request.scope["state"]["arrived"])

        return await while_there(request, _answered(served, request, body, start, responses))

    @app.get("/v1/responses/{ident}", response_model=replies.ResponseReply, responses={n: ERRORS[n] for n in (401, 404)})
    async def kept(ident: str) -> Any:
        """A response that is kept."""
        return Json(responses.stored(served, ident).response)

    @app.delete("/v1/responses/{ident}", response_model=replies.Deleted, responses={n: ERRORS[n] for n in (401, 404)})
    async def forget(ident: str) -> Any:
        """Forget a response."""
        responses.stored(served, ident)
        served.store.remove(ident)
        return Json({"id": ident, "object": "response", "deleted": True})


async def _answered(served: Served, request: Request, body: Any, start: Callable[[], Awaitable[Any]], kind: Any) -> Response:
    """A generation's response, whole or streamed; `kind` is the module that writes it."""
    request.scope["state"]["told"] |= {
        "model": body.model,
        "stream": bool(body.stream),
        "body": body.model_dump(exclude_unset=True),
    }
    under_way = await start()
    report = _reporter(served, request, body.model, under_way)
    note = getattr(under_way.asked, "note", None)
    headers = {"X-Swift-Note": note} if note else {}
    if note:
        request.scope["state"]["told"]["note"] = note
    if not body.stream:
        try:
            return Json(await kind.whole(served, body, under_way), headers=headers)
        finally:
            report()
    steps = under_way.steps()
    try:
        first = await anext(steps)  # before the status goes out, so that an error has its own
    except BaseException:
        report()
        raise
    return Events(kind.events(served, body, under_way, first, steps), served.metrics.cancelled.inc, report, headers)


def _heads(app: FastAPI, served: Served) -> None:
    @app.post("/v1/embeddings", response_model=replies.EmbeddingList, responses=ERRORS)
    async def embeddings(body: schemas.EmbeddingRequest, request: Request) -> Any:
        """Vectors of texts."""
        return Json(await while_there(request, heads.embeddings(served, body)))

    @app.post("/v1/rerank", response_model=replies.RerankReply, response_model_exclude_unset=True, responses=ERRORS)
    async def rerank(body: schemas.RerankRequest, request: Request) -> Any:
        """Documents by how well they answer a query."""
        return Json(await while_there(request, heads.rerank(served, body)))


def _tokens(app: FastAPI, served: Served) -> None:
    @app.post("/tokenize", response_model=replies.TokenizeReply, responses=ERRORS)
    async def tokenized(body: schemas.TokenizeRequest, request: Request) -> Any:
        """Token ids of a text, or of messages as the chat template renders them."""
        raw = await request.json()
        return Json(await asyncio.to_thread(tokenize.tokenize, served, body, raw))

    @app.post("/detokenize", response_model=replies.DetokenizeReply, responses=ERRORS)
    async def detokenized(body: schemas.DetokenizeRequest) -> Any:
        """The text of token ids."""
        return Json(await asyncio.to_thread(tokenize.detokenize, served, body))


def _adapters(app: FastAPI, served: Served) -> None:
    @app.post("/v1/load_adapter", response_model=replies.AdapterReply, responses=ERRORS)
    async def load(body: schemas.LoadAdapterRequest) -> Any:
        """Load an adapter from a folder below --adapter-root."""
        await adapters.load(served, body.name, body.path)
        served.log("adapter", name=body.name, loaded=True)
        return Json({"name": body.name, "loaded": True})

    @app.post("/v1/unload_adapter", response_model=replies.AdapterReply, responses=ERRORS)
    async def unload(body: schemas.UnloadAdapterRequest) -> Any:
        """Forget an adapter."""
        await adapters.unload(served, body.name)
        served.log("adapter", name=body.name, loaded=False)
        return Json({"name": body.name, "loaded": False})


def _reporter(served: Served, request: Request, model: str, under_way: Any) -> Callable[[], None]:
    """What ends a generation, and tells the log and the metrics of it."""

    told: list[bool] = []

    def report() -> None:
        under_way.close()
        if told:
            return
        told.append(True)
        usage = under_way.usage
        served.metrics.prompt_tokens.labels(model).inc(usage.prompt)
        served.metrics.cached_tokens.labels(model).inc(sum(usage.cached.values()))
        served.metrics.answer_tokens.labels(model).inc(usage.answers)
        served.metrics.drafted_tokens.labels(model).inc(usage.drafted)
        served.metrics.accepted_tokens.labels(model).inc(usage.accepted)
        finish = [answer.finish for answer in under_way.answers]
        request.scope["state"]["told"] |= {
            "prompt_tokens": usage.prompt, "completion_tokens": usage.answers,
            "finish": finish if len(finish) > 1 else finish[0],
        }  # fmt: skip

    return report


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
