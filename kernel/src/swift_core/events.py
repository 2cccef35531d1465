"""The one event stream of a run: the progress bar, `log.jsonl` and callbacks all read it.

Kinds: run, step, eval, checkpoint, table, note, warning, progress, summary, done, closed. A `step` holds at least step, steps,
loss, learning_rate, tokens_per_second, seconds_left and peak_bytes, and may have `charts`, names of figures to draw, and
`told`, a text for people; an `eval` step and loss; a `table` title, step, columns and rows.
"""

from __future__ import annotations

import json
import sys
import threading
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
        self.emit("progress", task=name, done=0, total=None, counted=False)
        try:
            yield
        finally:
            self.emit("progress", task=name, done=1, total=1, finished=True, counted=False)

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
    """Lines for pipes and logs. A task that takes over two seconds says so, then every ten seconds, and how it ended."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self.stream = stream or sys.stderr
        self._started: dict[str, tuple[float, threading.Timer]] = {}
        self._told: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        if line := self.line(event):
            self._write(line)

    def _write(self, line: str) -> None:
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
        task, done, total, now = event.data["task"], event.data["done"], event.data["total"], event.time
        if task not in self._started:
            timer = threading.Timer(2, self._begun, [task])
            self._started[task], timer.daemon = (now, timer), True
            if not event.data.get("counted", True):  # a counted one gives signs, and may fork
                timer.start()
        started, timer = self._started[task]
        if event.data.get("finished"):
            timer.cancel()
            del self._started[task]
            ended = f"{done} done" if event.data.get("counted", True) else f"done in {format_seconds(now - started)}"
            return f"{task}: {ended}" if self._told.pop(task, None) else None
        if now - started < 2 or now - self._told.get(task, 0) < 10:
            return None
        self._told[task] = now
        return f"{task}: {done}{f'/{total}' if total else ''}"

    def _begun(self, task: str) -> None:
        """A task that gave no sign for two seconds, such as the loading of a model."""
        if task in self._started and task not in self._told:
            self._told[task] = time.time()
            self._write(f"{task} ...")


def describe_step(data: dict[str, Any]) -> str:
    """One training step as a line: loss, speed and the time left."""
    return (
        f"step {data['step']}/{data['steps']}  loss {data['loss']:.4f}  lr {data['learning_rate']:.2e}  "
        f"{data['tokens_per_second']:.0f} tokens/s  {format_seconds(data['seconds_left'])} left" + str(data.get("told", ""))
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


def console_events(strict: bool = False) -> EventSink:
    """An event stream that shows itself on standard error."""
    events = EventSink(strict)
    events.add(make_console())
    return events
