"""The contracts of the five commands, the file that `infer` writes, and folders that are whole or not there.

What the commands do on a trained model is tested across distributions, in tests/test_commands_use.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from swift_core.cli.common import options
from swift_core.errors import RequestError, RunError
from swift_core.events import EventSink
from swift_core.testing import CommandContract
from swift_core.types import Completion, Record, Request
from swift_plugin_use.answers import CHUNK, answer_file, chunks_of, split_reference
from swift_plugin_use.chat import chat
from swift_plugin_use.folders import largest_gap, write_folder
from swift_plugin_use.options import SAMPLING, take_request


class TestInfer(CommandContract):
    distribution, id = "swift-plugin-use", "infer"


class TestChat(CommandContract):
    distribution, id = "swift-plugin-use", "chat"


class TestEval(CommandContract):
    distribution, id = "swift-plugin-use", "eval"


class TestQuantize(CommandContract):
    distribution, id = "swift-plugin-use", "quantize"


class TestExport(CommandContract):
    distribution, id = "swift-plugin-use", "export"


class Upper:
    """An engine that answers in capitals, refuses what asks it to, and stops for good after so many answers."""

    def __init__(self, answers: int = 10**6) -> None:
        self.left, self.seeds = answers, [0][:0]

    def generate(self, requests: Sequence[Request], stream: bool = False) -> Iterator[Completion]:
        texts = [request.messages[-1]["content"] for request in requests if request.messages]
        if "refuse" in texts:
            raise ValueError("no such thing")
        for index, text in enumerate(texts):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            self.seeds.append(requests[index].seed or 0)
            yield Completion(index, text.upper(), [1] * len(text), finish="stop")


def record(number: int, question: str, answer: str | None = None) -> Record:
    said = [{"role": "assistant", "content": answer}] if answer is not None else []
    return Record({"messages": [{"role": "user", "content": question}, *said]}, f"rows:{number + 1}")


def answer(engine: Any, records: list[Record], output: Path, **job: Any) -> dict[str, int]:
    chunks = partial(chunks_of, engine, records, Request(temperature=1.0, seed=100), writer=None)
    return answer_file(chunks, records, output, job, EventSink())


def rows(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def test_the_rows_own_answer_is_its_reference() -> None:
    messages = record(0, "a", "b").row["messages"]
    assert split_reference({"messages": messages}) == (messages[:1], "b")
    assert split_reference({"messages": messages[:1]}) == (messages[:1], None)
    calls = [{"role": "assistant", "content": [{"type": "text", "text": "é"}]}]
    assert split_reference({"messages": [*messages[:1], *calls]})[1] == "é"


def test_one_bad_row_spoils_no_other(tmp_path: Path) -> None:
    records = [record(0, "a", "A"), record(1, "refuse"), Record({}, "rows:3", refused="no messages"), record(3, "b")]
    assert answer(Upper(), records, tmp_path / "out.jsonl") == {"answered": 2, "failed": 2, "resumed": 0}
    found = rows(tmp_path / "out.jsonl")
    assert [(row["row"], row.get("response"), row.get("error")) for row in found] == [
        (0, "A", None), (1, None, "no such thing"), (2, None, "no messages"), (3, "B", None),
    ]  # fmt: skip
    alone = Record({"messages": [{"role": "assistant", "content": "a text"}]}, "rows:1")
    assert answer(Upper(), [alone, record(1, "a")], tmp_path / "alone.jsonl")["failed"] == 1
    assert rows(tmp_path / "alone.jsonl")[0]["error"] == "the row has no message to answer: its only one is the answer"
    with pytest.raises(RunError, match=r"no row could be answered"):
        answer(Upper(), [record(0, "refuse")], tmp_path / "other.jsonl")


def test_it_goes_on_in_the_middle_of_a_file_with_the_same_seeds(tmp_path: Path) -> None:
    records = [record(n, f"question {n}") for n in range(2 * CHUNK + 5)]
    answer(whole := Upper(), records, tmp_path / "whole.jsonl")
    with pytest.raises(KeyboardInterrupt):
        answer(Upper(CHUNK + 3), records, tmp_path / "out.jsonl")
    assert len(rows(tmp_path / "out.jsonl")) == CHUNK
    with pytest.raises(RequestError, match=r"was begun with another model, data set or settings"):
        answer(Upper(), records, tmp_path / "out.jsonl", model="another")
    more = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)[CHUNK : CHUNK + 2]
    with (tmp_path / "out.jsonl").open("ab") as file:
        file.write(b"".join(more))  # a kill within a chunk: it is asked again whole, so that rounding is as in one go
    resumed = answer(rest := Upper(), records, tmp_path / "out.jsonl")
    assert resumed == {"answered": CHUNK + 5, "failed": 0, "resumed": CHUNK}
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert rest.seeds == whole.seeds[CHUNK:] == [100 + n for n in range(CHUNK, 2 * CHUNK + 5)]
    with pytest.raises(RequestError, match=r"exists and is finished"):
        answer(Upper(), records, tmp_path / "out.jsonl")


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def half(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_folder(target, False, half)
    assert list(tmp_path.iterdir()) == []
    assert write_folder(target, False, lambda folder: (folder / "config.json").write_text("1") and None) == target
    with pytest.raises(RequestError, match=r"exists and is not empty; choose another, or replace a model with --overwrite"):
        write_folder(target, False, half)
    with pytest.raises(OSError, match="No space left"):
        write_folder(target, True, half)
    assert (target / "config.json").read_text() == "1", "the model that was there stays"
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.txt").write_text("years of work")
    with pytest.raises(RequestError, match=r"exists and is not empty"):
        write_folder(tmp_path / "papers", True, half)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_largest_gap() -> None:
    assert largest_gap([[-1.0, -2.0], [-3.0]], [[-1.5, -2.0], [-2.25]]) == 0.75


def test_sampling_options_become_a_request() -> None:
    import click

    seen: list[Any] = []

    @click.command()
    @options(SAMPLING, click.option("--other", default="x"))
    def command(**flags: Any) -> None:
        seen.extend([take_request(flags), flags])

    CliRunner().invoke(
        command, ["--max-tokens", "7", "--temperature", "0.5", "--top-k", "3", "--min-p", "0.1", "--stop", "a", "--stop", "b"]
    )
    assert seen == [Request(max_tokens=7, temperature=0.5, top_k=3, min_p=0.1, stop=["a", "b"]), {"seed": None, "other": "x"}]
    assert CliRunner().invoke(chat, ["--top-p", "0"]).exit_code == 2
