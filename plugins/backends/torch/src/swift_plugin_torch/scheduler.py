"""The one thread that runs the model: requests join between decode steps, and leave as they end.

A round admits rows to free slots, reads some tokens of their prompts, and makes one token for each running row. Others who
need the model (log-probabilities, adapters, new weights) get it between two rounds. The thread ends where there is no work.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from swift_core.errors import RunError, SwiftError, one_line

from swift_plugin_torch.rows import Row

CHUNKS = 4  # parts of prompts read before each decode step while fewer than half of the slots decode


class Work(Protocol):
    """What the scheduler drives: see `runner.Runner`."""

    def joins(self, row: Row) -> bool: ...

    def begin(self, row: Row, slot: int) -> None: ...

    def read(self, rows: dict[int, Row]) -> None: ...

    def decode(self, rows: dict[int, Row]) -> None: ...

    def leave(self, row: Row, slot: int) -> None: ...

    def move(self, slot: int, to: int) -> None: ...

    def together(self, rows: Sequence[Row]) -> None: ...

    def alike(self, one: Row, other: Row) -> bool: ...

    def reset(self) -> None: ...

    def rest(self) -> None: ...


class Scheduler:
    """Rows that wait and rows that run. All methods may be called from any thread."""

    def __init__(self, work: Work, slots: int, together: int) -> None:
        self._work, self._slots, self._together = work, slots, together
        self._changed = threading.Condition()
        self._waiting: deque[Row] = deque()
        self._running: dict[int, Row] = {}  # by slot; a row is in here from its admission to its end
        self._thread: threading.Thread | None = None
        self._stepping = self._held = self.closed = False
        self._asking = self._draining = 0  # who waits for the model: between rounds, or for no row to run

    # --- what others call ---------------------------------------------------------------------------------------------

    def submit(self, rows: Sequence[Row]) -> None:
        """Let rows wait for their turn, those of a request together and its first one first."""
        with self._changed:
            if self.closed:
                raise RunError("the engine is closed")
            self._waiting.extend(rows)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="swift-engine", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    @contextmanager
    def exclusive(self, drain: bool = False) -> Iterator[None]:
        """The model for the caller alone, between two rounds; with `drain` after all running rows have ended."""
        with self._changed:
            self._draining += drain
            self._asking += not drain
            try:
                self._changed.wait_for(lambda: not self._held and not self._stepping and not (drain and self._running))
                self._held = True
            finally:
                self._draining -= drain
                self._asking -= not drain
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._held = False
                self._changed.notify_all()

    def wait_for(self, over: Callable[[list[Row]], bool]) -> None:
        """Wait until `over` is true of all rows that wait or run."""
        with self._changed:
            self._changed.wait_for(lambda: over([*self._waiting, *self._running.values()]))

    def load(self) -> tuple[int, int]:
        """Rows that run, and rows that wait."""
        with self._changed:
            return len(self._running), len(self._waiting)

    def close(self) -> None:
        """End all rows with an error, and the thread."""
        with self._changed:
            self.closed = True
            rows = [*self._waiting, *self._running.values()]
            self._waiting.clear()
            thread = self._thread
            self._changed.notify_all()
        for call in {id(row.call): row.call for row in rows}.values():
            call.fail(RunError("the engine was closed before the request was finished"))
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with torch.inference_mode():
            while self._next():
                try:
                    self._round()
                except Exception as err:
                    self._fail(err)

    def _next(self) -> bool:
        """Between two rounds: let others have the model, and see what there is to do. False ends the thread."""
        with self._changed:
            self._stepping = False
            self._sweep()
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._held and not self._asking and not (self._draining and not self._running))
            self._sweep()
            if not self._waiting and not self._running:
                try:
                    self._work.rest()
                finally:
                    self._thread = None
                self._changed.notify_all()
                return False
            self._stepping = True
            return True

    def _sweep(self) -> None:
        """Let go of rows that are finished or that nobody waits for."""
        for slot, row in list(self._running.items()):
            if row.finish is not None or row.call.cancelled or self.closed:
                del self._running[slot]
                if slot >= 0:
                    self._work.leave(row, slot)
        if any(row.call.cancelled for row in self._waiting):
            self._waiting = deque(row for row in self._waiting if not row.call.cancelled)

    def _round(self) -> None:
        apart = self._admit()
        if apart:
            self._work.together(apart)
            if left := [row for row in apart if row.finish is None and not row.call.cancelled]:
                raise RunError(f"its own generation ended before {len(left)} answers did")
            return
        for _ in range(CHUNKS):
            with self._changed:
                self._sweep()  # a prompt may be answered by its first token
            reading = {slot: row for slot, row in self._running.items() if not row.ids}
            decoding = len(self._running) - len(reading)
            if reading:
                self._work.read(reading)
                self._admit_others()
            if not reading or 2 * decoding >= self._slots:
                break
        running = {
            slot: row for slot, row in self._running.items() if row.ids and row.finish is None and not row.call.cancelled
        }
        if running:
            self._work.decode(self._compact(running))

    def _compact(self, running: dict[int, Row]) -> dict[int, Row]:
        """Rows close together, the highest moved into holes, where holes are many: a step costs for them too."""
        while max(running) + 1 > len(self._running) + len(self._running) // 4:
            hole = next(slot for slot in range(self._slots) if slot not in self._running)
            highest = max(self._running)
            if highest not in running or hole > highest:
                break
            self._work.move(highest, hole)
            with self._changed:
                self._running[hole] = self._running.pop(highest)
            running[hole] = running.pop(highest)
        return running

    def _admit(self) -> list[Row]:
        """Give waiting rows the free slots, in their order. Rows that cannot share the cache come back, when it is their turn:
        they run alone."""
        with self._changed:
            if self._draining and self._running:
                return []
            head = self._waiting[0] if self._waiting else None
            if head is not None and not self._work.joins(head):
                if self._running:
                    return []  # what runs is finished first
                chosen = [row for row in self._waiting if row is head or self._work.alike(head, row)][: self._together]
                self._waiting = deque(row for row in self._waiting if row not in chosen)
                self._running = {-1 - n: row for n, row in enumerate(chosen)}
                return chosen
            left: deque[Row] = deque()
            begun = []
            while self._waiting:
                row = self._waiting.popleft()
                free = next((slot for slot in range(self._slots) if slot not in self._running), None)
                ready = row.leads or row.prompt.logits is not None
                if free is None or not self._work.joins(row):
                    left.append(row)
                    break
                if not ready:
                    left.append(row)  # others may go before it: its first row is still being read
                    continue
                self._running[free] = row
                begun.append((row, free))
            left.extend(self._waiting)
            self._waiting = left
        for row, slot in begun:
            try:
                self._work.begin(row, slot)
            except SwiftError as err:  # the request's own fault
                row.call.fail(err)
        return []

    def _admit_others(self) -> None:
        """After a prompt was read, the request's other rows can begin."""
        with self._changed:
            follow = any(not row.leads for row in self._waiting)
        if follow:
            self._admit()

    def _fail(self, err: Exception) -> None:
        """The model failed: so did all that was running. Those that wait go on."""
        cause = err if isinstance(err, SwiftError) else RunError(f"the model failed: {one_line(err)}")
        if cause is not err:
            cause.__cause__ = err
        with self._changed:
            rows = list(self._running.values())
            self._running.clear()
            self._work.reset()
        for call in {id(row.call): row.call for row in rows}.values():
            call.fail(cause)
