"""Many requests at once from plain generators: an event loop in a thread of its own, read as things arrive.

Leaving the generator, by closing it or by an error, cancels what still runs; a cancelled request closes its connection.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Loop:
    """An event loop in a daemon thread. `run` waits for a coroutine; `merged` reads several streams as one."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The coroutine's result. Cancels it where the wait is interrupted."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def merged(self, streams: Sequence[AsyncIterator[T]]) -> Iterator[T]:
        """What the streams give, as it comes. The first error of one is raised, and the others are cancelled."""
        arrived: queue.SimpleQueue[T | _Ended] = queue.SimpleQueue()

        async def pump(stream: AsyncIterator[T]) -> None:
            try:
                async for item in stream:
                    arrived.put(item)
            except BaseException as err:  # handed to the reader, a cancellation too
                arrived.put(_Ended(err))
                raise
            arrived.put(_Ended())

        futures: list[Future[None]] = [asyncio.run_coroutine_threadsafe(pump(stream), self._loop) for stream in streams]
        left = len(futures)
        try:
            while left:
                item = arrived.get()
                if not isinstance(item, _Ended):
                    yield item
                elif item.error is not None:
                    raise item.error
                else:
                    left -= 1
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        """Cancel all that runs, and end the thread. May be called twice."""
        if not self._thread.is_alive():
            return

        async def cancel_all() -> None:
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self.run(cancel_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class _Ended(Generic[T]):
    """A stream's end, with the error that ended it."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error
