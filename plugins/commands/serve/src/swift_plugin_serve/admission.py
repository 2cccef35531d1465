"""How many requests are worked on, how many wait, and what the others are told.

First come, first served. A place is held until the engine is through with the request, not only until its client is.
"""

from __future__ import annotations

import asyncio
from collections import deque

from swift_plugin_serve.errors import ApiError

ENDING = "the server is shutting down"


class Admission:
    """`running` places and a queue of `waiting`. All methods are called in the event loop."""

    def __init__(self, running: int, waiting: int) -> None:
        self.limit, self.room = running, waiting
        self.running = 0
        self.queue: deque[asyncio.Future[None]] = deque()
        self.closed = False

    @property
    def waiting(self) -> int:
        return len(self.queue)

    async def enter(self) -> None:
        """Wait for a place. Raises ApiError 429 where too many wait, 503 while the server ends."""
        if self.closed:
            raise ApiError(503, ENDING, code="shutting_down", headers={"Connection": "close"})
        if self.running < self.limit and not self.queue:
            self.running += 1
            return
        if len(self.queue) >= self.room:
            message = f"{self.running} requests run and {self.waiting} wait: try again later"
            raise ApiError(429, message, code="too_many_requests", headers={"Retry-After": str(self.retry_after())})
        place = asyncio.get_running_loop().create_future()
        self.queue.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled() and place.exception() is None:
                self.leave()  # it was given the place in the same moment
            elif place in self.queue:
                self.queue.remove(place)
            raise

    def leave(self) -> None:
        """Give a place back; the first who waits gets it."""
        while self.queue:
            place = self.queue.popleft()
            if not place.done():
                place.set_result(None)
                return
        self.running -= 1

    def close(self) -> None:
        """Take nobody any more. Those who wait go on waiting: they have been taken."""
        self.closed = True

    def abandon(self) -> None:
        """Tell those who wait that their turn will not come."""
        while self.queue:
            place = self.queue.popleft()
            if not place.done():
                place.set_exception(ApiError(503, ENDING, code="shutting_down", headers={"Connection": "close"}))

    def retry_after(self) -> int:
        """Seconds: a second for each round of the queue, 60 at most."""
        return max(1, min(60, len(self.queue) // max(1, self.limit)))
