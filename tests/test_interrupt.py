"""Ctrl-C: the run finishes its step, saves, says how to go on; going on ends with the weights of the undisturbed run."""

from __future__ import annotations

import json
import shlex
import signal
from pathlib import Path

import pytest
from support import THREADS, Forks, checkpoint, events, state, summary, sums, swift, write_rows

SETTINGS = [THREADS, "tuner.dropout=0.1", "trainer.epochs=10", "trainer.batch_size=1", "trainer.save_every=1000"]


@pytest.fixture(scope="module")
def command(tiny_folder: Path, rows: Path) -> list[object]:
    return ["train", "--model", tiny_folder, "--dataset", rows, *SETTINGS]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_saves_and_says_how_to_go_on(command: list[object], number: int, tmp_path: Path, forks: Forks) -> None:
    whole, output = tmp_path / "whole", tmp_path / "run"
    swift(*command, "--output", whole).ok()
    run = forks.start(*command, "--output", output)
    assert run.until(lambda: (output / "log.jsonl").exists() and len(events(output, "step")) >= 3)
    run.signal(number)
    done = run.wait()
    step = events(output, "step")[-1]["step"]
    saved, config = output / "checkpoints" / f"step-{step}", output / "config.yaml"
    again = f"swift-core train {config} trainer.resume=true"
    assert done.code == 1
    assert done.error == f"stopped at step {step}; saved {saved}. Continue: {again}"
    assert "stopping after this step; once more stops at once, without saving" in done.err
    assert 3 <= step < 130
    assert checkpoint(output).resolve() == saved
    assert summary(output)["stopped"] == "interrupted"

    swift(*shlex.split(again)[1:]).ok()
    assert state(output) == state(whole)
    assert summary(output)["stopped"] is None
    assert summary(output)["train_loss"] == summary(whole)["train_loss"]


def test_the_second_stops_at_once(command: list[object], tmp_path: Path, forks: Forks) -> None:
    output = tmp_path / "run"
    run = forks.start(*command, "--output", output, "dataset.0.weight=200", "trainer.accumulate=2600")  # a step takes seconds
    assert run.until(lambda: "training" in run.read("err"))
    run.signal(signal.SIGINT)
    assert run.until(lambda: "once more stops at once" in run.read("err"))
    run.signal(signal.SIGINT)
    done = run.wait()
    assert (done.code, done.err.splitlines()[-1]) == (1, "stopped")
    assert not list(output.glob("checkpoints/*step-*"))
    assert [json.loads(line)["event"] for line in (output / "log.jsonl").read_text().splitlines()][:1] == ["run"]


def test_before_anything_is_trained(tiny_folder: Path, tmp_path: Path, forks: Forks) -> None:
    output, many = tmp_path / "run", write_rows(tmp_path / "many.jsonl", sums(0, 50_000))  # tokenizing takes long
    run = forks.start("train", "--model", tiny_folder, "--dataset", many, "--output", output, *SETTINGS)
    assert run.until(lambda: "tokenizing: " in run.read("err"))
    run.signal(signal.SIGINT)
    done = run.wait()
    assert (done.code, done.err.splitlines()[-1]) == (1, "stopped")
    assert not output.exists()
