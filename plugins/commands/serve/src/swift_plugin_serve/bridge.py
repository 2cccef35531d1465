"""From an engine's iterator, which blocks, to asyncio: one thread a call, a bounded queue between the two.

A reader that is slow makes the engine's thread wait; a reader that goes away makes it close the iterator.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Generic, TypeVar

T = TypeVar("T")

LIMIT = 64  # items between the two


class Bridge(Generic[T]):
    """An asynchronous iterator over what `make()` yields in a thread of its own.

    make: called in that thread. finished: called in the loop when the thread is through with the iterator, also after `stop`.
    """

    def __init__(self, make: Callable[[], Iterator[T]], finished: Callable[[], None], limit: int = LIMIT) -> None:
        self._make, self._finished = make, finished
        self._loop = asyncio.get_running_loop()
        self._items: deque[tuple[bool, Any]] = deque()  # (whether it is an item, the item or how it ended)
        self._there = asyncio.Event()
        self._room = threading.Semaphore(limit)
        self._stopped = threading.Event()
        self._iterator: Any = None
        # A daemon: an engine that hangs must not keep the process from ending.
        threading.Thread(target=self._work, name="generate", daemon=True).start()

    def __aiter__(self) -> Bridge[T]:
        return self

    async def __anext__(self) -> T:
        while not self._items:
            self._there.clear()
            await self._there.wait()
        whether, item = self._items[0]
        if not whether:  # stays there: whoever asks again gets it again
            raise item or StopAsyncIteration
        self._items.popleft()
        self._room.release()
        found: T = item
        return found

    def fail(self, err: Exception) -> None:
        """End with an error, at once, before what is still in the queue."""
        self._items.appendleft((False, err))
        self._there.set()
        self.stop()

    def stop(self) -> None:
        """The reader is gone: close the iterator, at its next item at the latest."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        self._room.release()
        iterator = self._iterator
        # A generator cannot be closed while it runs in its thread, which does it; others may be, and then end at once.
        if iterator is not None and not inspect.isgenerator(iterator) and hasattr(iterator, "close"):
            threading.Thread(target=_close, args=(iterator,), daemon=True).start()

    def _work(self) -> None:
        end: Any = None
        try:
            self._iterator = iterator = self._make()
            for item in iterator:
                self._room.acquire()
                if self._stopped.is_set():
                    break
                self._post(True, item)
        except BaseException as err:  # handed to the reader
            end = err if isinstance(err, Exception) else RuntimeError(f"{type(err).__name__}: {err}")
            if isinstance(end, StopAsyncIteration):
                end = RuntimeError("the engine raised StopAsyncIteration")
        finally:
            _close(self._iterator)
            self._post(False, end)
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                self._loop.call_soon_threadsafe(self._finished)

    def _post(self, whether: bool, item: Any) -> None:
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._put, whether, item)

    def _put(self, whether: bool, item: Any) -> None:
        self._items.append((whether, item))
        self._there.set()


def _close(iterator: Any) -> None:
    with suppress(Exception):
        if hasattr(iterator, "close"):
            iterator.close()
