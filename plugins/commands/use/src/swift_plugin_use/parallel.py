"""Chunks of rows answered in several processes, each with an engine of its own, and put together in order.

Chunk c is process c modulo N's. A process waits until its chunk is taken, so no more than one chunk each is held. What the file
holds is always a beginning of it: a killed call goes on from there, with any number of processes.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from glob import glob
from multiprocessing.connection import Connection
from typing import Any

from swift_core.config import RunConfig
from swift_core.errors import RequestError, RunError, SwiftError, one_line
from swift_core.events import EventSink
from swift_core.types import Request

from swift_plugin_use.answers import Rows, chunks_of
from swift_plugin_use.records import read_records


def parallel_chunks(config: RunConfig, adapter: str | None, request: Request, starts: range, count: int) -> Iterator[Rows]:
    """The rows of the chunks that begin at `starts`, in order. Raises RunError where a process ends early."""
    count = max(1, min(count, len(starts)))
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        pipes = []
        for number in range(count):
            ours, theirs = context.Pipe(duplex=False)
            share = starts[number::count]
            process = context.Process(target=_work, args=(theirs, config, adapter, request, share), daemon=True)
            with _environment(number, count):
                process.start()
            theirs.close()
            stack.callback(_end, process)
            pipes.append((process, ours))
        for turn in range(len(starts)):
            process, pipe = pipes[turn % count]
            yield _take(process, pipe, turn % count)


def _take(process: Any, pipe: Connection, number: int) -> Rows:
    try:
        kind, found = pipe.recv()
    except EOFError:
        process.join(10)
        how = f"with exit code {process.exitcode}"
        raise RunError(f"process {number} ended {how} before its rows were answered; the same call again goes on") from None
    if kind == "request":
        raise RequestError(found)
    if kind == "run":
        raise RunError(found)
    rows: Rows = found
    return rows


def _end(process: Any) -> None:
    if process.is_alive():
        process.terminate()
    process.join(10)
    if process.is_alive():
        process.kill()
        process.join()


class _environment:
    """What a process starts with: its share of the cores, and a device of its own where there are several."""

    def __init__(self, number: int, count: int) -> None:
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = given.split(",") if given else [str(n) for n in range(len(glob("/dev/nvidia[0-9]*")))]
        self.wanted = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // count))}
        if len(devices) > 1:
            self.wanted["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]

    def __enter__(self) -> None:
        self.before = {name: os.environ.get(name) for name in self.wanted}
        os.environ.update(self.wanted)

    def __exit__(self, *error: object) -> None:
        for name, value in self.before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def _work(pipe: Connection, config: RunConfig, adapter: str | None, request: Request, starts: range) -> None:
    """In a process: answer chunks, and hand each over. An error is handed over as its line."""
    from swift_core.session import Session

    try:
        with Session(config, EventSink(config.strict)) as session:
            opened = session.opened(adapter)
            records = read_records(session, opened.template)
            for rows in chunks_of(opened.engine, records, request, starts, opened.template):
                pipe.send(("rows", rows))
    except (BrokenPipeError, KeyboardInterrupt):
        pass  # nobody takes them any more
    except Exception as err:
        kind = "request" if isinstance(err, RequestError) else "run"
        with suppress(BrokenPipeError):
            pipe.send((kind, str(err) if isinstance(err, SwiftError) else f"a process failed: {one_line(err)}"))
