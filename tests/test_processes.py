"""Several processes: the losses of one process at the same global batch; errors, Ctrl-C and resume as with one."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support import THREADS, Forks, checkpoint, events, state, summary, sums, swift, weights, write_rows

SETTINGS = [THREADS, "tuner.rank=4", "trainer.learning_rate=1e-3", "trainer.epochs=10", "trainer.save_every=1000"]
TWO = ["--nproc", "2", "trainer.batch_size=1", "trainer.accumulate=2"]
ONE = ["trainer.batch_size=2", "trainer.accumulate=2"]


@pytest.fixture(scope="module")
def command(tiny_folder: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """13 rows, 4 a step: the last step of an epoch has one row, and one of two ranks none. 3 rows to evaluate on."""
    held = write_rows(tmp_path_factory.mktemp("held") / "held.jsonl", sums(50, 3))
    return ["train", "--model", tiny_folder, "--dataset", rows, f"eval_dataset={held}", *SETTINGS]


@pytest.fixture(scope="module")
def two(command: list[object], forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("two") / "run"
    forks.run(*command, *TWO, "--output", output).ok()
    return output


def ranks_of(output: Path) -> list[int]:
    """Process ids of the launchers and ranks that work on a run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(output).encode() in words and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def test_two_processes_equal_one(command: list[object], two: Path, tmp_path: Path) -> None:
    one = tmp_path / "run"
    swift(*command, *ONE, "--output", one).ok()
    mine, theirs = events(one, "step"), events(two, "step")
    assert [event["step"] for event in theirs] == [event["step"] for event in mine] == list(range(1, 41))
    for a, b in zip(mine, theirs, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
        assert (a["tokens"], a["trained_tokens"], a["learning_rate"]) == (b["tokens"], b["trained_tokens"], b["learning_rate"])
    evals = [event["loss"] for event in events(one, "eval")]
    assert len(evals) == 10
    assert [event["loss"] for event in events(two, "eval")] == pytest.approx(evals, abs=1e-4)
    assert evals[-1] < evals[0] - 0.1, "something was learned, so that the weights were compared too"
    assert summary(two)["train_loss"] == pytest.approx(summary(one)["train_loss"], abs=1e-4)
    assert (summary(two)["tokens"], summary(two)["trained_tokens"]) == (summary(one)["tokens"], summary(one)["trained_tokens"])
    left, right = (load_file(checkpoint(run) / "adapter_model.safetensors") for run in (one, two))
    assert max(float((left[name] - right[name]).abs().max()) for name in left) < 1e-3


@pytest.mark.parametrize("feed", [["trainer.packing=true", "trainer.max_length=160"], ["trainer.padding=always"]])
def test_two_processes_equal_one_however_rows_are_laid(
    command: list[object], forks: Forks, tmp_path: Path, feed: list[str]
) -> None:  # fmt: skip
    short = [*command, *feed, "trainer.epochs=4"]
    swift(*short, "trainer.batch_size=2", "--output", tmp_path / "one").ok()
    forks.run(*short, "--nproc", "2", "trainer.batch_size=1", "--output", tmp_path / "two").ok()
    for kind in ("step", "eval"):
        mine, theirs = ([event["loss"] for event in events(tmp_path / name, kind)] for name in ("one", "two"))
        assert len(mine) >= 4
        assert theirs == pytest.approx(mine, abs=1e-4)


def test_ctrl_c_and_resume(command: list[object], two: Path, forks: Forks, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run = forks.start(*command, *TWO, "--output", output)
    assert run.until(lambda: (output / "log.jsonl").exists() and len(events(output, "step")) >= 3, timeout=60)
    run.signal(signal.SIGINT)
    done = run.wait()
    step = events(output, "step")[-1]["step"]
    assert step < 40
    assert done.code == 1
    assert done.error == (
        f"stopped at step {step}; saved {output}/checkpoints/step-{step}. "
        f"Continue: swift-core train {output}/config.yaml trainer.resume=true"
    )
    assert ranks_of(output) == []
    forks.run("train", output / "config.yaml", "trainer.resume=true").ok()
    assert state(output) == state(two)
    assert (checkpoint(output) / "random-1.safetensors").read_bytes() == (checkpoint(two) / "random-1.safetensors").read_bytes()


@pytest.mark.slow
def test_no_rank_outlives_the_command(command: list[object], forks: Forks, tmp_path: Path) -> None:
    """kill -9 reaches the command alone: its ranks finish their step, save, and end."""
    output = tmp_path / "run"
    run = forks.start(*command, *TWO, "--output", output, "trainer.epochs=1000")
    assert run.until(lambda: (output / "log.jsonl").exists() and len(events(output, "step")) >= 3, timeout=60)
    run.kill()
    try:
        end = time.monotonic() + 15
        while ranks_of(output) and time.monotonic() < end:
            time.sleep(0.1)
        assert ranks_of(output) == []
    finally:
        for left in ranks_of(output):
            os.kill(left, signal.SIGKILL)
    last = events(output, "step")[-1]["step"]
    assert checkpoint(output).resolve().name == f"step-{last}"


def test_an_error_of_a_rank_is_one_line(command: list[object], forks: Forks, tmp_path: Path) -> None:
    output = tmp_path / "run"
    done = forks.run(*command, *TWO, "backend.device=cuda:99", "--output", output)
    assert done.code == 2
    assert re.fullmatch(r"backend\.torch\.device: 'cuda:99' asks for GPU 99, and \d are available", done.error)
    assert [line for line in done.err.splitlines() if not line.startswith(("data: ", "error: "))] == []
    assert not output.exists()


@pytest.mark.slow
def test_a_rank_that_dies(command: list[object], forks: Forks, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run = forks.start(*command, *TWO, "--output", output, "trainer.save_every=1", "trainer.epochs=1000")
    assert run.until(lambda: len(list(output.glob("checkpoints/step-*"))) >= 2, timeout=60)
    os.kill(max(ranks_of(output)), signal.SIGKILL)  # the last rank that was started
    done = run.wait()
    assert done.code == 1
    assert done.error == "a rank was killed by signal 9: there was too little memory, or somebody did it"
    assert ranks_of(output) == []
    assert weights(output, max(int(path.name[5:]) for path in output.glob("checkpoints/step-*")))
