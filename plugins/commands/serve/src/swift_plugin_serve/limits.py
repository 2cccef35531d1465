"""Around every request: its id, its size, who asks, and a line in the log at its end. Pure ASGI: streams flow through."""

from __future__ import annotations

import re
import time
from typing import Any
from uuid import uuid4

from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from swift_plugin_serve.auth import authorized
from swift_plugin_serve.errors import ApiError, respond
from swift_plugin_serve.served import Served

IDENT = re.compile(r"[A-Za-z0-9._-]{1,128}")
OPEN = {"/", "/health", "/openapi.json"}  # paths that need no key


class Limits:
    """The outermost layer: `app` is only reached by requests that may go on."""

    def __init__(self, app: Any, served: Served) -> None:
        self.app, self.served = app, served

    def _for_pages(self, app: Any) -> Any:
        """The application for pages of other origins, refusals included: without these headers a page does not see them."""
        if not self.served.settings.cors:
            return app
        return CORSMiddleware(
            app, allow_origins=list(self.served.settings.cors), allow_methods=["GET", "POST", "DELETE"], allow_headers=["*"],
            expose_headers=["X-Request-Id", "X-Swift-Note", "Retry-After"],
        )  # fmt: skip

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        asked = headers.get("x-request-id", "")
        ident = asked if IDENT.fullmatch(asked) else uuid4().hex
        state = scope.setdefault("state", {})
        state |= {"ident": ident, "arrived": time.monotonic(), "told": {}}
        seen = {"status": 0, "bytes": 0}

        async def sized() -> Any:
            message = await receive()
            if message["type"] == "http.request":
                seen["bytes"] += len(message.get("body", b""))
                if seen["bytes"] > self.served.settings.max_body:
                    large = self._large()
                    raise HTTPException(large.status, large.message, large.headers)  # of all, FastAPI lets this one through
            return message

        async def marked(message: Any) -> None:
            if message["type"] == "http.response.start":
                seen["status"] = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", ident.encode())]
            await send(message)

        try:
            if refusal := self._refused(scope, headers):
                await self._for_pages(respond(refusal))(scope, receive, marked)
            else:
                await self._for_pages(self.app)(scope, sized, marked)
        finally:
            self._finished(scope, state, seen["status"])

    def _refused(self, scope: Any, headers: dict[str, str]) -> ApiError | None:
        served, path = self.served, scope["path"]
        host = re.sub(r":\d+$", "", headers.get("host", "")).strip("[]").lower()
        if served.settings.hosts and host not in served.settings.hosts:
            return ApiError(403, "the Host header names another server: ask for it by the address that it listens on")
        if (
            scope["method"] != "OPTIONS"
            and path not in OPEN
            and not authorized(headers.get("authorization"), served.settings.keys)
        ):
            message = (
                "an API key is needed: Authorization: Bearer KEY" if "authorization" not in headers else "the key is wrong"
            )
            return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > served.settings.max_body:
            return self._large()
        kind = headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":
            # A page of another origin may post other types without asking first.
            return ApiError(415, f"the body is {kind or 'of no type'}: application/json is expected")
        return None

    def _large(self) -> ApiError:
        size = self.served.settings.max_body
        return ApiError(413, f"the body has more than {size} bytes", code="too_large", headers={"Connection": "close"})

    def _finished(self, scope: Any, state: Any, status: int) -> None:
        served, seconds = self.served, time.monotonic() - state["arrived"]
        route = scope.get("route")
        path = getattr(route, "path", None) or "other"
        served.metrics.requests.labels(path, str(status)).inc()
        served.metrics.seconds.labels(path).observe(seconds)
        if path not in ("/health", "/metrics"):
            told = {key: value for key, value in state["told"].items() if served.settings.log_prompts or key != "body"}
            served.log(
                "request", id=state["ident"], method=scope["method"], path=scope["path"], status=status,
                seconds=round(seconds, 4), **told,
            )  # fmt: skip
