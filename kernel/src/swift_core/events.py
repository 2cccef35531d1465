"""The one event stream of a run: the progress bar, `log.jsonl` and callbacks all read it.

Kinds: run, step, eval, checkpoint, note, warning, progress, summary, done, closed. A `step` holds at least step, steps, loss,
learning_rate, tokens_per_second, seconds_left and peak_bytes; an `eval` step and loss.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

from swift_core.errors import PluginError
from swift_core.types import Callback

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Event:
    """`time` is seconds since the epoch. `data` is JSON-able."""

    kind: str
    data: dict[str, Any] = field(default_factory=dict)
    time: float = field(default_factory=time.time)


Listener = Callable[[Event], None]


class EventSink:
    """Passes events on to its listeners, in the order they were added."""

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self._listeners: list[Listener] = []

    def add(self, listener: Listener) -> None:
        self._listeners.append(listener)

    def remove(self, listener: Listener) -> None:
        self._listeners.remove(listener)

    def add_callback(self, callback: Callback) -> None:
        """A callback that raises is reported once and switched off; under strict it ends the run."""
        name = type(callback).__name__

        def guarded(event: Event) -> None:
            try:
                callback.on_event(event)
            except Exception as err:
                if self.strict:
                    raise PluginError(name, "on_event", f"{type(err).__name__}: {err}") from err
                self._listeners.remove(guarded)
                self.emit("warning", text=f"callback {name} failed and is switched off: {type(err).__name__}: {err}")

        self.add(guarded)

    def emit(self, kind: str, **data: Any) -> None:
        event = Event(kind, data)
        for listener in list(self._listeners):
            listener(event)

    def note(self, text: str) -> None:
        self.emit("note", text=text)

    def warn(self, text: str) -> None:
        self.emit("warning", text=text)

    @contextmanager
    def task(self, name: str) -> Iterator[None]:
        """Something long that cannot be counted: a bar without an end while it lasts."""
        self.emit("progress", task=name, done=0, total=None)
        try:
            yield
        finally:
            self.emit("progress", task=name, done=1, total=1, finished=True)

    def track(self, items: Iterable[T], task: str, total: int | None = None) -> Iterator[T]:
        """Yield the items, emitting `progress` events at most ten times a second."""
        if total is None and isinstance(items, Sized):
            total = len(items)
        last, done = time.monotonic(), 0
        self.emit("progress", task=task, done=0, total=total)
        for item in items:
            yield item
            done += 1
            if time.monotonic() - last >= 0.1:
                last = time.monotonic()
                self.emit("progress", task=task, done=done, total=total)
        self.emit("progress", task=task, done=done, total=done, finished=True)


class LogWriter:
    """Appends one event a line to `log.jsonl`; progress ticks are left out."""

    def __init__(self, path: Path) -> None:
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def __call__(self, event: Event) -> None:
        if event.kind != "progress":
            line = json.dumps(
                {"event": event.kind, "time": round(event.time, 3), **event.data}, ensure_ascii=False, default=str
            )
            self._file.write(line + "\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()


class PlainConsole:
    """Lines for pipes and logs. A task that takes over two seconds says so, then every ten seconds."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self.stream = stream or sys.stderr
        self._started: dict[str, float] = {}
        self._told: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        line = self.line(event)
        if line:
            self.stream.write(line + "\n")
            self.stream.flush()

    def line(self, event: Event) -> str | None:
        """The text of an event, or None when there is nothing to say yet."""
        data = event.data
        if event.kind in ("note", "warning"):
            return f"warning: {data['text']}" if event.kind == "warning" else str(data["text"])
        if event.kind == "progress":
            return self._progress(event)
        if event.kind == "step":
            return describe_step(data)
        if event.kind == "eval":
            return f"evaluated at step {data['step']}: eval loss {data['loss']:.4f}" + (
                " (best so far)" if data.get("best") else ""
            )
        if event.kind == "checkpoint":
            return f"saved {data['path']}"
        return None

    def _progress(self, event: Event) -> str | None:
        task, now = event.data["task"], event.time
        if event.data.get("finished"):
            self._started.pop(task, None)
            said = self._told.pop(task, None)
            return f"{task}: {event.data['done']} done" if said else None
        started = self._started.setdefault(task, now)
        if now - started < 2 or now - self._told.get(task, 0) < 10:
            return None
        self._told[task] = now
        total = f"/{event.data['total']}" if event.data["total"] else ""
        return f"{task}: {event.data['done']}{total}"


def describe_step(data: dict[str, Any]) -> str:
    """One training step as a line: loss, speed and the time left."""
    return (
        f"step {data['step']}/{data['steps']}  loss {data['loss']:.4f}  lr {data['learning_rate']:.2e}  "
        f"{data['tokens_per_second']:.0f} tokens/s  {format_seconds(data['seconds_left'])} left"
    )


def format_seconds(seconds: float) -> str:
    """`75` -> `1:15`; `3700` -> `1:01:40`."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def make_console() -> Listener:
    """A progress bar on a tty, plain lines otherwise. Both write to standard error."""
    if sys.stderr.isatty():
        from swift_core.progress import RichConsole

        return RichConsole()
    return PlainConsole()
