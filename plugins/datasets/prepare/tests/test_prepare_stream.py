"""Streams: windows that depend on their position alone, made in advance, and an account without double listing."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from swift_core.errors import RequestError, RowError, RunError
from swift_core.source import Source
from swift_core.types import Record, Sample, Samples, Stream
from swift_plugin_prepare.prepare import make_encoder
from swift_plugin_prepare.rows import one_source
from swift_plugin_prepare.stream import WindowStream, split_stream

OpenStream = Callable[..., WindowStream]


@pytest.fixture
def stream(template: Any, tmp_path: Path) -> Iterator[OpenStream]:
    """`stream(rows(20), 8)` opens a stream of windows of 8 rows, in a folder of its own unless one is given."""
    opened: list[WindowStream] = []

    def make(source: Any, size: int, folder: Path | None = None, workers: int = 0, bad_rows: str = "stop") -> WindowStream:
        source = source if isinstance(source, Source) else Source("rows", source)
        encoder = make_encoder([source], template, SimpleNamespace(max_length=None), bad_rows)
        opened.append(WindowStream(folder or tmp_path / f"windows-{len(opened)}", encoder, size, workers))
        return opened[-1]

    yield make
    for made in opened:
        made.close()


def walk(stream: Stream, position: int = 0, windows: int = 100) -> list[tuple[int, list[Sample]]]:
    """(position, samples) of each window until the source ends."""
    found = []
    for _ in range(windows):
        samples, following = stream.window(position)
        found.append((position, [samples[n] for n in range(len(samples))]))
        position = following
        if not position:
            break
    return found


def wheres(samples: Samples) -> list[str]:
    return [samples[n].where for n in range(len(samples))]


def test_windows_cover_the_source_and_begin_again(rows: Callable[..., Any], stream: OpenStream) -> None:
    opened = stream(rows(20), 8)
    assert isinstance(opened, Stream)
    assert isinstance(opened.window(0)[0], Samples)
    found = walk(opened)
    assert [(position, len(samples)) for position, samples in found] == [(0, 8), (8, 8), (16, 4)]
    assert [sample.where for _, samples in found for sample in samples] == [f"rows.txt:{n}" for n in range(1, 21)]
    assert [sample.row for _, samples in found for sample in samples] == list(range(20))
    assert walk(opened) == found
    assert walk(stream(rows(16), 8)) == found[:2]  # a source that ends with its window


@pytest.mark.parametrize("workers", [0, 2])
def test_a_window_depends_on_its_position_alone(workers: int, rows: Callable[..., Any], stream: OpenStream) -> None:
    source = rows(700)
    expected = dict(walk(stream(source, 300)))
    assert list(expected) == [0, 300, 600]
    opened = stream(source, 300, workers=workers)
    for position in (600, 0, 600, 300):  # as after a resume, or one that is resumed again
        samples, following = opened.window(position)
        assert [samples[n] for n in range(len(samples))] == expected[position]
        assert following == (position + 300) % 900


def test_to_skip_is_to_read_and_not_to_encode(
    rows: Callable[..., Any], stream: OpenStream, template: Any, tmp_path: Path
) -> None:
    template.log = tmp_path / "log"
    opened = stream(rows(40), 8)
    assert wheres(opened.window(24)[0])[0] == "rows.txt:25"
    end = time.monotonic() + 10
    while len(encoded := template.log.read_text().splitlines()) < 16:  # the next window is made meanwhile
        assert time.monotonic() < end
        time.sleep(0.01)
    assert encoded == [f"q{n}" for n in range(25, 41)]


class Endless:
    """A data set of another plugin: an iterator of records without an end."""

    def __init__(self, name: str = "n") -> None:
        self.name = name

    def __iter__(self) -> Iterator[Record]:
        return (Record({"q": self.name, "a": str(n)}, f"{self.name}:{n}") for n in count())


def test_a_source_without_end(stream: OpenStream) -> None:
    opened = stream(Endless(), 5)
    assert [position for position, _ in walk(opened, windows=4)] == [0, 5, 10, 15]
    assert wheres(opened.window(1_000_000)[0]) == [f"n:{n}" for n in range(1_000_000, 1_000_005)]


def test_several_sources_are_mixed_by_weight(rows: Callable[..., Any], stream: OpenStream) -> None:
    parts = [Source("a", Endless("a"), weight=3), Source("b", rows(4)), Source("c", Endless("c"))]
    assert one_source(parts[:1]) is parts[0]
    samples, following = stream(one_source(parts), 30).window(0)
    names = [where.partition(":")[0] for where in wheres(samples)]
    assert [names.count(name) for name in ("a", "rows.txt", "c")] == [19, 4, 7]
    assert names[:5].count("a") == 3
    assert wheres(stream(one_source(parts), 10).window(20)[0]) == wheres(samples)[20:]
    assert following == 30


def test_bad_rows_are_counted_and_listed_once(rows: Callable[..., Any], stream: OpenStream, tmp_path: Path) -> None:
    source, data = rows(20, bad=(3, 12, 13)), tmp_path / "data"
    data.mkdir()
    first = {"where": "held", "what": "refused", "reason": "x", "tokens": 0, "split": "eval"}
    (data / "issues.jsonl").write_text(json.dumps(first) + "\n")

    def listed() -> list[str]:
        return [json.loads(line)["where"] for line in (data / "issues.jsonl").read_text().splitlines()]

    opened = stream(source, 8, bad_rows="skip")
    opened.follow(data)
    opened.window(0)
    assert listed() == ["held", "rows.txt:3"]
    opened.window(8)
    before = (data / "account.json").read_text()
    assert (opened.account.rows, opened.account.samples, dict(opened.account.reasons)) == (16, 13, {"refused": 3})
    assert opened.account.tokens == sum(sum(opened.window(position)[0].lengths) for position in (0, 8))
    # killed after window 8 and between the list and the counts of window 0; then resumed in window 8, to the end, and again
    with (data / "issues.jsonl").open("a") as file:
        file.write('{"where": "again", "what": "refused", "reason": "x", "tokens": 0, "record": 18}\n')
    resumed = stream(source, 8, bad_rows="skip")
    resumed.follow(data)
    assert (data / "account.json").read_text() == before
    for position in (8, 16, 0, 8):
        resumed.window(position)
    assert listed() == ["held", "rows.txt:3", "rows.txt:12", "rows.txt:13"]
    counts = json.loads((data / "account.json").read_text())
    assert (counts["rows"], counts["samples"], counts["reasons"], counts["rows_to"]) == (20, 17, {"refused": 3}, 20)


def test_a_bad_row_stops_the_window_that_holds_it(rows: Callable[..., Any], stream: OpenStream) -> None:
    opened = stream(rows(20, bad=(12,)), 8)
    assert len(opened.window(0)[0]) == 8
    with pytest.raises(RowError, match=r"^rows.txt:12: no tab \(bad_rows=skip"):
        opened.window(8)


def test_a_window_may_be_empty_and_a_source_may_not(rows: Callable[..., Any], stream: OpenStream) -> None:
    opened = stream(rows(6, bad=(1, 2)), 2, bad_rows="skip")
    assert [len(samples) for _, samples in walk(opened)] == [0, 2, 2]
    with pytest.raises(RequestError, match="dataset: no row is left to train on"):
        stream(rows(2, "bad.txt", bad=(1, 2)), 2, bad_rows="skip").window(0)


def test_ranks_share_their_windows(rows: Callable[..., Any], stream: OpenStream, template: Any, tmp_path: Path) -> None:
    template.log = tmp_path / "log"
    source, folder = rows(80), tmp_path / "shared"
    one, two = stream(source, 8, folder), stream(source, 8, folder)
    for position in range(0, 80, 8):
        first, second = one.window(position), two.window(position)
        assert wheres(first[0]) == wheres(second[0]) == [f"rows.txt:{n}" for n in range(position + 1, position + 9)]
        assert first[1] == second[1] == (position + 8) % 80
    assert sorted(template.log.read_text().split()[:80]) == sorted(f"q{n}" for n in range(1, 81))  # each row once
    assert len([path for path in folder.iterdir() if path.name.isdigit()]) <= 4
    assert walk(stream(source, 8, folder)) == walk(one)  # what was removed is made again


def test_the_digest_is_that_of_source_and_settings(rows: Callable[..., Any], stream: OpenStream) -> None:
    source = rows(20)
    first = stream(source, 8).digest
    assert stream(source, 8, workers=2).digest == first
    assert len({first, stream(source, 9).digest, stream(rows(20, bad=(5,)), 8, bad_rows="skip").digest}) == 3


def test_closing_ends_the_process_and_a_killed_one_is_told(rows: Callable[..., Any], stream: OpenStream) -> None:
    opened, other = stream(rows(20), 8), stream(rows(20), 8)
    opened.window(0)
    opened.close()
    with pytest.raises(ProcessLookupError):
        os.kill(opened._worker.pid, 0)
    os.kill(other._worker.pid, signal.SIGKILL)
    with pytest.raises(RunError, match=r"^data: a process that prepares rows was killed"):
        other.window(0)


def test_what_a_stream_needs(rows: Callable[..., Any], stream: OpenStream) -> None:
    trainer, source = SimpleNamespace(max_steps=10), Source("rows", rows(20))
    with pytest.raises(RequestError, match=r"^stream: how long it is, is not known beforehand; set trainer.max_steps$"):
        split_stream([source], [], 0, SimpleNamespace(max_steps=None))
    with pytest.raises(RequestError, match=r"^holdout: of a stream the first rows are kept back; expected a count, not 0.5$"):
        split_stream([source], [], 0.5, trainer)
    with pytest.raises(RequestError, match=r"^stream: dataset 'few' cannot be sampled at random; take the first rows with"):
        split_stream([Source("few", rows(20), sample=3)], [], 0, trainer)
    given = [Source("held", rows(3, "held.txt"), evaluation=True)]
    assert split_stream([source], given, 0.5, trainer) == (source, given)
    train, (held,) = split_stream([source], [], 3, trainer)
    assert held.evaluation
    assert [held.record(raw).where for raw in held.raws()] == ["rows.txt:1", "rows.txt:2", "rows.txt:3"]
    samples, following = stream(train, 8).window(0)
    assert (wheres(samples), following) == ([f"rows.txt:{n}" for n in range(4, 12)], 8)
    assert [samples[n].row for n in range(8)] == list(range(3, 11))
