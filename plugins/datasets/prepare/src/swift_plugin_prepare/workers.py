"""Processes that work through chunks, their results in order: the same whatever the number of processes.

Forked, so that template and tokenizer are there at once, and before any device or process group is in use. The parent sends a
worker its next chunk only after taking its last result, so neither ever waits for the other in a circle.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain, islice
from multiprocessing.connection import Connection, Pipe
from typing import Any, NoReturn

from swift_core.errors import RequestError, RowError, RunError, SwiftError

LARGE = 16  # chunks from which on processes pay for themselves


class Worker:
    """A child process that answers each message with `work(message)`."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self.end, theirs = Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            _serve(theirs, self.end, work)
        theirs.close()

    def send(self, message: Any) -> None:
        with suppress(OSError):  # it is gone: `receive` says so
            self.end.send(message)

    def receive(self) -> Any:
        """Its next answer. Raises what it raised, or RunError where it was killed."""
        try:
            failed, answer = self.end.recv()
        except (EOFError, OSError):
            raise RunError(
                "data: a process that prepares rows was killed: there was too little memory, or somebody did it "
                "(data_workers=0 does without such processes)"
            ) from None
        if failed:
            raise _error(*answer)
        return answer

    def stop(self) -> None:
        self.end.close()
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def _serve(end: Connection, parents: Connection, work: Callable[[Any], Any]) -> NoReturn:
    """The child: ends with its parent, leaves Ctrl-C to it, and writes nothing."""
    try:
        parents.close()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads of the parent are not there after a fork
        while True:
            message = end.recv()
            try:
                answer = (False, work(message))
            except Exception as err:
                answer = (True, _told(err))
            end.send(answer)
    finally:
        os._exit(0)


def _told(err: Exception) -> tuple[str, tuple[str, ...]]:
    if isinstance(err, RowError):
        return "row", (err.where, err.reason)
    if isinstance(err, SwiftError):
        return ("request" if isinstance(err, RequestError) else "run"), (str(err),)
    return "run", (f"data: a process that prepares rows failed: {type(err).__name__}: {' '.join(str(err).split())}",)


def _error(kind: str, values: tuple[str, ...]) -> SwiftError:
    kinds: dict[str, Callable[..., SwiftError]] = {"row": RowError, "request": RequestError, "run": RunError}
    return kinds[kind](*values)


class Pool:
    """Maps `work` over chunks. workers: None is up to four processes where there is much to do, 0 is none."""

    def __init__(self, work: Callable[[Any], Any], workers: int | None) -> None:
        self.work, self.wanted = work, workers if hasattr(os, "fork") else 0
        self.workers: list[Worker] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self.workers:
            worker.stop()

    def map(self, chunks: Iterable[Any]) -> Iterator[Any]:
        chunks, wanted = iter(chunks), self.wanted
        if wanted is None:
            head = list(islice(chunks, LARGE))
            chunks, wanted = chain(head, chunks), min(cores(), 4) if len(head) == LARGE else 0
            wanted = 0 if wanted == 1 else wanted
        if not wanted:
            yield from map(self.work, chunks)
            return
        while len(self.workers) < wanted:
            self.workers.append(Worker(self.work))
        busy: list[Worker] = []
        for worker, chunk in zip(self.workers, chunks, strict=False):
            worker.send(chunk)
            busy.append(worker)
        while busy:
            following = list(islice(chunks, 1))  # read while the workers are at work
            worker = busy.pop(0)
            answer = worker.receive()
            if following:
                worker.send(following[0])
                busy.append(worker)
            yield answer


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
