"""Server-sent events, and work that ends when its client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from swift_plugin_serve.errors import ApiError, text_of

T = TypeVar("T")

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", "Connection": "keep-alive"}
DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """Nobody is there to read the answer."""


def event(value: Any, name: str | None = None) -> bytes:
    """One event: its data as JSON on one line."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {text_of(value)}\n\n".encode("utf-8", "replace")


async def following(items: AsyncIterator[T]) -> T | None:
    """The next item, or None at the end. A cancelled `anext(items, None)` leaves a generator running (Python 3.11)."""
    try:
        return await items.__anext__()
    except StopAsyncIteration:
        return None


async def to_the_end(made: AsyncGenerator[bytes, None], fault: Callable[[BaseException], None]) -> AsyncGenerator[bytes, None]:
    """Events as they are made, and `[DONE]`. An error becomes the last event; one that nobody foresaw goes to `fault`."""
    try:
        async with aclosing(made):
            async for one in made:
                yield one
    except ApiError as err:
        yield event(err.body())
    except Exception as err:
        fault(err)
        yield event(ApiError(500, "the server failed while it wrote this answer").body())
    yield DONE


async def while_there(request: HttpRequest, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away. Raises ClientGone then."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        task.cancel()
        await asyncio.wait({task})
        raise ClientGone
    finally:
        for one in (task, gone):
            one.cancel()


async def _gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Events(Response):
    """Sends events as they are made. `left` is called where the client went away, `closed` at the end, whatever happens."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], left: Callable[[], None], closed: Callable[[], None],
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(headers=HEADERS | (headers or {}), media_type=self.media_type)
        del self.headers["content-length"]
        self.events, self.left, self.closed = events, left, closed

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        sending, gone = asyncio.ensure_future(self._send(send)), asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                self.left()
                sending.cancel()
                await asyncio.wait({sending})
            elif sending.exception() is not None:
                error = sending.exception()
                if not isinstance(error, OSError):
                    raise error  # type: ignore[misc]
                self.left()
        finally:
            for one in (sending, gone):
                one.cancel()
            self.closed()
            await self.events.aclose()

    async def _send(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for chunk in self.events:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
