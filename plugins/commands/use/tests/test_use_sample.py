"""`sample`: which answers are kept, with what scores, and that a killed call ends with the same file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from swift_core.errors import RequestError, RunError
from swift_core.events import EventSink
from swift_core.session import Opened
from swift_core.testing import CommandContract
from swift_core.types import Completion, Record, Request
from swift_plugin_use.sample import CHUNK, Sampling, sample, side_of, write_file


class TestSample(CommandContract):
    distribution, id = "swift-plugin-use", "sample"


class Counting:
    """An engine that answers with as many letters as the seed's last digit says; it stops for good after so many answers."""

    capabilities = frozenset({"stream"})

    def __init__(self, answers: int = 10**6) -> None:
        self.left = answers

    def generate(self, requests: Sequence[Request], stream: bool = False) -> Iterator[Completion]:
        if any((request.messages or [{}])[-1]["content"] == "refuse" for request in requests):
            raise ValueError("no such thing")
        for index, request in enumerate(requests):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            text = "x" * ((request.seed or 0) % 10)
            yield Completion(index, text, [1] * len(text), finish="stop")


def length(completions: list[str], rows: list[Any]) -> list[float]:
    return [float(len(text)) for text in completions]


def record(number: int, question: str, **more: Any) -> Record:
    talk = [{"role": "user", "content": question}, {"role": "assistant", "content": "xx"}]
    return Record({"messages": talk, **more}, f"rows:{number + 1}")


def asking(engine: Any, keep: str, margin: float = 0.0, count: int = 4, seed: int = 0) -> Sampling:
    request = Request(temperature=1.0, seed=seed)
    return Sampling(Opened("counting", engine), request, count, [("length", 2.0, length)], keep, margin)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def texts(file: Path) -> list[str]:
    return [row["messages"][-1]["content"] for row in lines(file)]


def test_best_worst_all_and_pairs(tmp_path: Path) -> None:
    """Row 0 gets the seeds 0 to 3, row 1 those from 4 to 7, row 2 the seeds 8, 9, 10, 11."""
    records = [record(n, f"q{n}", tools=[{"name": "f"}]) for n in range(3)]
    found = {}
    for keep in ("best", "worst", "all", "pairs"):
        output = tmp_path / f"{keep}.jsonl"
        write_file(asking(Counting(), keep), records, output, {}, EventSink())
        found[keep] = [len(text) for text in texts(output)]
    assert found == {"best": [3, 7, 9], "worst": [0, 4, 0], "all": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1], "pairs": [3, 7, 9]}
    first = lines(tmp_path / "pairs.jsonl")[1]
    assert first["messages"] == [{"role": "user", "content": "q1"}, {"role": "assistant", "content": "x" * 7}]
    assert first["rejected"] == [{"role": "user", "content": "q1"}, {"role": "assistant", "content": "x" * 4}]
    assert (first["scores"], first["rejected_scores"]) == ({"length": 7.0, "score": 14.0}, {"length": 4.0, "score": 8.0})
    assert (first["row"], first["where"], first["tools"]) == (1, "rows:2", [{"name": "f"}])
    assert [row["choice"] for row in lines(tmp_path / "all.jsonl")] == [0, 1, 2, 3] * 3


def test_rows_without_a_pair_and_rows_that_fail_are_told(tmp_path: Path) -> None:
    records = [record(0, "q"), record(1, "refuse"), record(2, "q"), Record({}, "rows:4", refused="no messages")]
    output = tmp_path / "pairs.jsonl"
    counts = write_file(asking(Counting(), "pairs", margin=8.0), records, output, {}, EventSink())
    assert counts == {"kept": 1, "rows": 4, "skipped": 1, "failed": 2, "resumed": 0}
    assert [row["row"] for row in lines(output)] == [2]
    assert lines(side_of(output)) == [
        {"row": 0, "where": "rows:1", "skipped": "the scores differ by 6, not by more than 8"},
        {"row": 1, "where": "rows:2", "error": "no such thing"},
        {"row": 3, "where": "rows:4", "error": "no messages"},
    ]
    with pytest.raises(RunError, match="no row could be answered"):
        write_file(asking(Counting(), "best"), [record(0, "refuse")], tmp_path / "none.jsonl", {}, EventSink())


@pytest.mark.parametrize("keep", ["all", "pairs"])
def test_a_killed_call_ends_with_the_same_file(tmp_path: Path, keep: str) -> None:
    records = [record(n, "refuse" if n == 3 else f"q{n}") for n in range(3 * CHUNK)]
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    write_file(asking(Counting(), keep), records, whole, {}, EventSink())
    with pytest.raises(KeyboardInterrupt):
        write_file(asking(Counting(4 * (2 * CHUNK + 2)), keep), records, output, {}, EventSink())
    held = output.read_bytes()
    assert 0 < held.count(b"\n") < whole.read_bytes().count(b"\n")
    output.write_bytes(held[: held[:-1].rfind(b"\n") + 9])  # within the last line
    with pytest.raises(RequestError, match="was begun with another"):
        write_file(asking(Counting(), keep), records, output, {"other": 1}, EventSink())
    counts = write_file(asking(Counting(), keep), records, output, {}, EventSink())
    assert counts["resumed"] == CHUNK, "the rows of a chunk are asked together, as in one go"
    assert output.read_bytes() == whole.read_bytes()
    assert side_of(output).read_bytes() == side_of(whole).read_bytes()


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(record(n, f"q{n}").row) + "\n" for n in range(3)))
    return file


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(sample, [str(argument) for argument in arguments])


def test_the_command_with_a_model(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    """The same answers twice, and others with another seed; each row's best by the metric that it was asked for."""
    base = ["--model", tiny_folder, "--dataset", rows_file, "--reward", "metric:length", "--max-tokens", 6]
    done = run(*base, "--keep", "all", "--output", tmp_path / "all.jsonl")
    assert done.exit_code == 0, done.output
    run(*base, "--output", tmp_path / "best.jsonl")
    run(*base, "--output", tmp_path / "other.jsonl", "--seed", 1, "--keep", "all")
    every = lines(tmp_path / "all.jsonl")
    assert [(row["row"], row["choice"]) for row in every] == [(n, choice) for n in range(3) for choice in range(4)]
    for number, best in enumerate(lines(tmp_path / "best.jsonl")):
        mine = [row for row in every if row["row"] == number]
        top = max(mine, key=lambda row: row["scores"]["score"])
        assert (best["messages"], best["scores"]) == (top["messages"], top["scores"])
    assert len({json.dumps(row["messages"]) for row in every}) > 6
    reward = "{name: length, label: brief, weight: 0.5, max: 3}"
    run(*base[:4], "--reward", reward, "--max-tokens", 6, "--keep", "all", "--output", tmp_path / "brief.jsonl")
    scores = [row["scores"] for row in lines(tmp_path / "brief.jsonl")]
    assert {(score["brief"], score["score"]) for score in scores} <= {(1.0, 0.5), (0.0, 0.0)}
    assert [row["messages"] for row in lines(tmp_path / "other.jsonl")] != [row["messages"] for row in every]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "--keep best needs a --reward"),
        (["--reward", "metric:length", "--weight", "1", "--weight", "2"], "2 for 1 rewards"),
        (["--reward", "metric:length", "--keep", "pairs", "--n", "1"], "--keep pairs needs --n 2 or more"),
        (["--reward", "metric:length", "--temperature", "0"], "gives the same answer 4 times"),
        (["--reward", "metric:length", "--reward", "metric:length"], "the same one is given twice"),
        (["--reward", "metric:nothing"], "nothing"),
        (["--reward", "metric:length", "--margin", "1"], "--margin is between the two of a pair: it needs --keep pairs"),
        (["--reward", "metric:length", "--judge-model", "x"], "--judge-model needs a judge: --reward judge:http"),
        (["--reward", "metric:length", "--judge-prompt", "x"], "--judge-prompt needs a judge"),
    ],
)
def test_wrong_requests(arguments: list[str], text: str, tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    done = run("--model", tiny_folder, "--dataset", rows_file, "--output", tmp_path / "out.jsonl", *arguments)
    assert isinstance(done.exception, RequestError)
    assert text in str(done.exception)
    assert not (tmp_path / "out.jsonl").exists()
