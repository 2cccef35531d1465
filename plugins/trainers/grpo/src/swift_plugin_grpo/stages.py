"""Stages of a step: how long each took, and a time-out that says which one hung.

A stage that is over its time gets a RunError in place, also while it waits for a lock, a socket or another process. One that
sits in a library that takes no signals ends the process a little later, with its name on standard error.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from swift_core.errors import RunError

GRACE = 30.0  # seconds after which a stage that takes no signal ends the process


class Stages:
    """Times of the stages of a step, by name. `limits` are seconds, 0 for none; a name without one takes `default`."""

    def __init__(self, limits: Mapping[str, float], default: float, address: str, grace: float = GRACE) -> None:
        self.limits, self.default, self.address, self.grace = limits, default, address, grace
        self.seconds: dict[str, float] = {}

    def take(self) -> dict[str, float]:
        """Seconds of each stage since the last call."""
        found, self.seconds = self.seconds, {}
        return found

    @contextmanager
    def stage(self, name: str, what: str = "") -> Iterator[None]:
        """Time what is inside. Raises RunError where it takes longer than its limit; `what` says more of it, a row for example.
        Stages may stand inside each other; time of the inner is not the outer's."""
        started, within = time.perf_counter(), sum(self.seconds.values())
        limit = self.limits.get(name, self.default)
        try:
            with self._watched(f"stage {name}{what and ' '}{what}", limit, name):
                yield
        finally:
            inner = sum(self.seconds.values()) - within
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started - inner

    @contextmanager
    def _watched(self, what: str, limit: float, name: str) -> Iterator[None]:
        if not limit or threading.current_thread() is not threading.main_thread():
            yield
            return

        def overdue(number: int, frame: FrameType | None) -> None:
            where = "".join(traceback.format_stack(frame, limit=1)).split("\n")[0].strip() if frame else "unknown"
            raise RunError(f"{what} has not ended in {limit:g} s; it was at {where} ({self.address}.{name} is the limit)")

        last = threading.Timer(limit + self.grace, _end, [what, limit + self.grace])
        last.daemon = True
        last.start()
        started = time.monotonic()
        before = signal.signal(signal.SIGALRM, overdue)
        outer, _ = signal.setitimer(signal.ITIMER_REAL, limit)
        try:
            yield
        finally:
            last.cancel()
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            if outer:
                signal.setitimer(signal.ITIMER_REAL, max(0.001, outer - (time.monotonic() - started)))


def _end(what: str, seconds: float) -> None:
    print(f"{what} has not ended in {seconds:g} s and takes no signal: the process ends", file=sys.stderr, flush=True)
    os._exit(1)


def gathered(value: Any) -> list[Any]:
    """The values of all ranks, in their order. Collective."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
