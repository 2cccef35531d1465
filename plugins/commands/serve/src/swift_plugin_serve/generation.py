"""One call of the engine for one HTTP request: a place, a thread, a time limit, and an end whatever happens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from swift_core.types import Completion, Request

from swift_plugin_serve.bridge import Bridge
from swift_plugin_serve.errors import ApiError, failure
from swift_plugin_serve.served import Served

T = TypeVar("T")


class Generation:
    """Pieces of the answers to `requests`, as the engine makes them. `arrived`: when the client's request came."""

    def __init__(self, served: Served, requests: Sequence[Request], arrived: float | None = None) -> None:
        self.served, self.requests = served, list(requests)
        self.arrived = time.monotonic() if arrived is None else arrived
        self.first: float | None = None  # when the first piece came
        self._bridge: Bridge[Completion] | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def start(self) -> Generation:
        """Wait for a place and begin. Raises ApiError 429, 503 or 504."""
        served, left = self.served, self.arrived + self.served.settings.timeout - time.monotonic()
        try:
            async with asyncio.timeout(left):
                await served.admission.enter()
        except TimeoutError:
            raise self._late() from None
        try:
            self._bridge = Bridge(self._make, served.admission.leave)
        except BaseException:
            served.admission.leave()
            raise
        served.live.add(self)
        left = self.arrived + served.settings.timeout - time.monotonic()
        self._timer = asyncio.get_running_loop().call_later(max(0.0, left), lambda: self.fail(self._late()))
        return self

    def _make(self) -> Iterator[Completion]:
        return self.served.engine.generate(self.requests, stream="stream" in self.served.capabilities)

    def _late(self) -> ApiError:
        return ApiError(504, f"the request took longer than {self.served.settings.timeout:g} seconds", code="timeout")

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> Completion:
        assert self._bridge is not None, "start() comes first"
        try:
            piece = await self._bridge.__anext__()
        except (StopAsyncIteration, asyncio.CancelledError):
            raise
        except Exception as err:
            told = failure(err)
            if told is not err and told.status >= 500:
                self.served.metrics.faults.inc()
                self.served.log.fault(None, err)
            raise told from err
        if self.first is None:
            self.first = time.monotonic()
            self.served.metrics.first.observe(self.first - self.arrived)
        return piece

    def fail(self, err: ApiError) -> None:
        """End here, with an error for the client."""
        if self._bridge is not None:
            self._bridge.fail(err)

    def close(self) -> None:
        """Through with it, or the client went away. The place is given back when the engine has let go."""
        if self._timer is not None:
            self._timer.cancel()
        if self._bridge is not None:
            self._bridge.stop()
        self.served.live.discard(self)


async def called(served: Served, work: Callable[[], T]) -> T:
    """What `work` returns, which runs in a thread and asks the engine something other than text. Holds a place meanwhile."""

    def one() -> Iterator[T]:
        with served.other:
            yield work()

    await served.admission.enter()
    bridge: Bridge[Any] = Bridge(one, served.admission.leave)
    try:
        async with asyncio.timeout(served.settings.timeout):
            result: T = await bridge.__anext__()
            return result
    except TimeoutError:
        raise ApiError(504, f"the request took longer than {served.settings.timeout:g} seconds", code="timeout") from None
    except Exception as err:
        told = failure(err)
        if told is not err and told.status >= 500:
            served.metrics.faults.inc()
            served.log.fault(None, err)
        raise told from err
    finally:
        bridge.stop()
