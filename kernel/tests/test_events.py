"""The event stream: order, callbacks that fail, progress, the log and the lines for people."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from swift_core.errors import PluginError
from swift_core.events import Event, EventSink, LogWriter, PlainConsole, format_seconds

STEP = {"step": 2, "steps": 5, "loss": 1.23456, "learning_rate": 1e-4, "tokens_per_second": 99.6, "seconds_left": 75}


class Failing:
    """A callback that fails at its first step."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_event(self, event: Event) -> None:
        self.seen.append(event.kind)
        if event.kind == "step":
            raise ValueError("no disk")


def collect(sink: EventSink) -> list[tuple[str, dict[str, Any]]]:
    found: list[tuple[str, dict[str, Any]]] = []
    sink.add(lambda event: found.append((event.kind, event.data)))
    return found


def test_listeners_hear_everything_in_the_order_added() -> None:
    sink, heard = EventSink(), []
    for name in "ab":
        sink.add(lambda event, name=name: heard.append((name, event.kind)))
    sink.note("x")
    sink.warn("y")
    assert heard == [("a", "note"), ("b", "note"), ("a", "warning"), ("b", "warning")]


def test_a_callback_that_fails_is_reported_once_and_switched_off() -> None:
    sink, failing = EventSink(), Failing()
    seen = collect(sink)
    sink.add_callback(failing)
    for _ in range(3):
        sink.emit("step", **STEP)
    sink.note("after")
    assert failing.seen == ["step"]
    assert [kind for kind, _ in seen] == ["step", "warning", "step", "step", "note"]
    assert seen[1][1] == {"text": "callback Failing failed and is switched off: ValueError: no disk"}


def test_the_other_callbacks_go_on() -> None:
    class Counting:
        count = 0

        def on_event(self, event: Event) -> None:
            self.count += event.kind == "step"

    sink, counting = EventSink(), Counting()
    sink.add_callback(Failing())
    sink.add_callback(counting)
    sink.emit("step", **STEP)
    sink.emit("step", **STEP)
    assert counting.count == 2


def test_under_strict_it_ends_the_run() -> None:
    sink = EventSink(strict=True)
    sink.add_callback(Failing())
    sink.note("before")
    with pytest.raises(PluginError) as caught:
        sink.emit("step", **STEP)
    assert str(caught.value) == "Failing failed in on_event: ValueError: no disk"
    assert isinstance(caught.value.__cause__, ValueError)


def test_track_yields_all_and_says_when_it_begins_and_ends() -> None:
    sink = EventSink()
    seen = collect(sink)
    assert list(sink.track([1, 2, 3], "reading")) == [1, 2, 3]
    assert seen[0] == ("progress", {"task": "reading", "done": 0, "total": 3})
    assert seen[-1] == ("progress", {"task": "reading", "done": 3, "total": 3, "finished": True})
    seen.clear()
    assert list(sink.track(iter("ab"), "reading")) == ["a", "b"]
    assert (seen[0][1]["total"], seen[-1][1]["done"]) == (None, 2)


def test_the_log_holds_a_line_an_event_and_no_ticks(tmp_path: Path) -> None:
    log = LogWriter(tmp_path / "log.jsonl")
    log(Event("note", {"text": "hé", "path": tmp_path}, time=1.23456))
    log(Event("progress", {"task": "x"}))
    log(Event("eval", {"loss": 0.5}, time=2.0))
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines == [
        {"event": "note", "time": 1.235, "text": "hé", "path": str(tmp_path)},
        {"event": "eval", "time": 2.0, "loss": 0.5},
    ]


def test_a_log_is_gone_on_with(tmp_path: Path) -> None:
    for kind in ("a", "b"):
        log = LogWriter(tmp_path / "log.jsonl")
        log(Event(kind))
        log.close()
    assert [json.loads(line)["event"] for line in (tmp_path / "log.jsonl").open()] == ["a", "b"]


@pytest.mark.parametrize(
    ("kind", "data", "line"),
    [
        ("note", {"text": "hello"}, "hello\n"),
        ("warning", {"text": "careful"}, "warning: careful\n"),
        ("step", STEP, "step 2/5  loss 1.2346  lr 1.00e-04  100 tokens/s  1:15 left\n"),
        ("eval", {"step": 2, "loss": 0.5, "best": True}, "evaluated at step 2: eval loss 0.5000 (best so far)\n"),
        ("eval", {"step": 2, "loss": 0.5}, "evaluated at step 2: eval loss 0.5000\n"),
        ("checkpoint", {"step": 2, "path": "runs/x"}, "saved runs/x\n"),
        ("run", {}, ""),
        ("unknown", {}, ""),
    ],
)
def test_plain_lines(kind: str, data: dict[str, Any], line: str) -> None:
    stream = io.StringIO()
    PlainConsole(stream)(Event(kind, data))
    assert stream.getvalue() == line


def test_a_task_speaks_after_two_seconds_and_then_every_ten() -> None:
    stream = io.StringIO()
    console = PlainConsole(stream)
    for second in (100.0, 101.9, 102.1, 105.0, 111.0, 112.2):
        console(Event("progress", {"task": "reading", "done": int(second), "total": 500}, second))
    console(Event("progress", {"task": "reading", "done": 500, "total": 500, "finished": True}, 113.0))
    assert stream.getvalue() == "reading: 102/500\nreading: 112/500\nreading: 500 done\n"


def test_a_task_that_gives_no_sign_speaks_all_the_same() -> None:
    """As the loading of a model: nothing happens between its beginning and its end."""
    stream, sink = io.StringIO(), EventSink()
    sink.add(PlainConsole(stream))
    with sink.task("loading m"):
        time.sleep(2.2)
        assert stream.getvalue() == "loading m ...\n"
    assert stream.getvalue() == "loading m ...\nloading m: done in 0:02\n"
    with sink.task("loading m"):
        pass
    time.sleep(2.2)
    assert stream.getvalue() == "loading m ...\nloading m: done in 0:02\n"


def test_a_quick_task_is_silent() -> None:
    stream = io.StringIO()
    console = PlainConsole(stream)
    for done, finished in ((0, False), (5, True)):
        console(Event("progress", {"task": "reading", "done": done, "total": 5, "finished": finished}, 100.0 + done / 5))
    assert stream.getvalue() == ""


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (75, "1:15"), (3700, "1:01:40")])
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
