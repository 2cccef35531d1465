"""Runs one command and measures it from outside: when each line of its log arrives, and the memory of its process tree.

Nothing that a tool reports of itself is used here, so that all tools are measured alike. Needs Linux (/proc).
Memory is the sum of the resident sets of the command and all that it starts; pages that two processes share count twice.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

PAGE = os.sysconf("SC_PAGE_SIZE")
PROC = Path("/proc")


@dataclass(frozen=True)
class Line:
    """A line of the log, and the seconds from the command's start to its first character."""

    seconds: float
    text: str


@dataclass(frozen=True)
class Measured:
    """What a command did. peak_bytes: see the module's first lines. processor_seconds: user and system time together."""

    status: int
    seconds: float
    peak_bytes: int
    processor_seconds: float
    lines: tuple[Line, ...]


def run(
    argv: Sequence[str], log: Path, env: Mapping[str, str] | None = None, cwd: Path | None = None,
    limit: float | None = None, every: float = 0.1, listen: Callable[[Line], None] | None = None,
) -> Measured:  # fmt: skip
    """Run `argv`, its output and errors together into `log`, and wait for it.

    limit: seconds after which it is ended (status -9). every: seconds between two looks at the memory.
    listen: called with each line as it arrives, in another thread.
    """
    before, started = os.times(), time.perf_counter()
    process = subprocess.Popen(
        list(argv), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=None if env is None else dict(env), cwd=cwd, start_new_session=True,
    )  # fmt: skip
    lines: list[Line] = []
    assert process.stdout is not None
    reader = threading.Thread(target=_read, args=(process.stdout, log, started, lines, listen), daemon=True)
    reader.start()
    peak = 0
    try:
        while process.poll() is None:
            peak = max(peak, tree_bytes(process.pid))
            if limit is not None and time.perf_counter() - started > limit:
                break
            time.sleep(every)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = time.perf_counter() - started
    reader.join(timeout=10)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return Measured(process.returncode, seconds, peak, used, tuple(lines))


def tree_bytes(pid: int) -> int:
    """Resident bytes of a process and its descendants now. A lone process counts with its own highest so far, which no
    interval between two looks can miss."""
    pids = list(descendants(pid))
    if len(pids) == 1:
        return status_bytes(pid, "VmHWM")
    return max(status_bytes(pid, "VmHWM"), sum(map(resident_bytes, pids)))


def descendants(pid: int) -> Iterator[int]:
    """The process and all below it that live now."""
    yield pid
    for file in PROC.glob(f"{pid}/task/*/children"):
        try:
            children = [int(word) for word in file.read_text().split()]
        except (OSError, ValueError):
            continue
        for child in children:
            yield from descendants(child)


def resident_bytes(pid: int) -> int:
    try:
        return int((PROC / str(pid) / "statm").read_text().split()[1]) * PAGE
    except (OSError, IndexError, ValueError):
        return 0


def status_bytes(pid: int, key: str) -> int:
    """A value of /proc/PID/status that is given in kB; 0 where the process is gone."""
    try:
        text = (PROC / str(pid) / "status").read_text()
    except OSError:
        return 0
    found = next((line for line in text.splitlines() if line.startswith(f"{key}:")), "")
    return int(found.split()[1]) * 1024 if found else 0


def _read(stream: IO[bytes], log: Path, started: float, lines: list[Line], listen: Callable[[Line], None] | None) -> None:
    """Lines as they come, each with the time at which it began to arrive: a progress bar's line ends only when the next is
    drawn. A carriage return ends one too."""
    rest, since = b"", 0.0
    with log.open("wb") as file:
        while chunk := os.read(stream.fileno(), 65536):
            now = time.perf_counter() - started
            file.write(chunk)
            file.flush()
            begun = since if rest.strip() else now
            *whole, rest = (rest + chunk).replace(b"\r", b"\n").split(b"\n")
            for text in whole:
                if text.strip():
                    line = Line(begun, text.decode("utf-8", "replace"))
                    lines.append(line)
                    if listen:
                        listen(line)
                    begun = now
            since = begun if not whole else now
    if rest.strip():
        lines.append(Line(since, rest.decode("utf-8", "replace")))
