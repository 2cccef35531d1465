"""A killed run goes on where it was: the weights it ends with are those of the run that nobody killed, bit for bit."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from support import THREADS, Forks, Result, checkpoint, events, state, summary, swift

SETTINGS = [
    THREADS, "tuner.rank=2", "tuner.dropout=0.2", "trainer.epochs=4", "trainer.batch_size=2", "trainer.accumulate=2",
    "trainer.save_every=1", "trainer.eval_every=3", "trainer.learning_rate=1e-2", "holdout=2",
]  # fmt: skip
"""12 steps of 4 rows: 11 are trained on, so that each epoch ends with an uneven step. Dropout draws random numbers."""


@pytest.fixture(scope="module")
def command(tiny_folder: Path, rows: Path) -> list[object]:
    return ["train", "--model", tiny_folder, "--dataset", rows, *SETTINGS]


@pytest.fixture(scope="module")
def whole(command: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    output = tmp_path_factory.mktemp("whole") / "run"
    swift(*command, "--output", output).ok()
    assert summary(output)["steps"] == 12
    return output


MODES = {
    "padded": ["trainer.padding=always"],
    "packed": ["trainer.packing=true", "trainer.max_length=160", "trainer.batch_size=1", "trainer.accumulate=1"],
    "by tokens": ["trainer.batch_tokens=200", "trainer.accumulate=1"],
    "stream": ["stream=true", "window=5", "trainer.max_steps=12"],
    "packed stream": ["stream=true", "window=5", "trainer.max_steps=12", "trainer.packing=true", "trainer.max_length=160"],
}
"""Ways to feed a run besides the default, which lays the rows of a pass end to end."""


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_killed_at_ten_random_points(mode: str, command: list[object], tmp_path: Path, forks: Forks) -> None:
    whole, output, generator, cut = tmp_path / "whole", tmp_path / "run", random.Random(mode), 0
    command = [*command, *MODES[mode]]
    swift(*command, "--output", whole).ok()
    assert summary(whole)["steps"] >= 8
    for _ in range(40):
        run = forks.start(*command, "--output", output, "trainer.resume=true")
        if run.until((output / "log.jsonl").exists):
            run.process.join(generator.uniform(0, 0.25))
        cut += run.process.exitcode is None
        run.kill()
        if cut == 10:
            break
    assert cut >= 5, "the kills came too late to mean anything"
    swift(*command, "--output", output, "trainer.resume=true").ok()
    assert state(output) == state(whole)


def resume(output: Path, *more: object) -> Result:
    return swift("train", output / "config.yaml", "trainer.resume=true", *more)


def test_killed_again_and_again(command: list[object], whole: Path, tmp_path: Path, forks: Forks) -> None:
    output, generator, cut = tmp_path / "run", random.Random(7), 0
    for _ in range(8):
        run = forks.start(*command, "--output", output, "trainer.resume=true")
        if run.until((output / "log.jsonl").exists):
            run.process.join(generator.uniform(0.05, 0.3))
        cut += run.process.exitcode is None
        run.kill()
    assert cut >= 3, "the kills came too late to mean anything"
    swift(*command, "--output", output, "trainer.resume=true").ok()
    assert state(output) == state(whole)
    for key in ("steps", "train_loss", "eval_loss", "best_eval_loss", "best_step", "tokens", "trained_tokens"):
        assert summary(output)[key] == summary(whole)[key], key
    told = {event["step"]: event["loss"] for event in events(output, "step")}
    assert told == {event["step"]: event["loss"] for event in events(whole, "step")}


def test_killed_in_the_middle_of_a_save(command: list[object], whole: Path, tmp_path: Path, forks: Forks) -> None:
    output, generator, halves = tmp_path / "run", random.Random(3), 0
    checkpoints = output / "checkpoints"
    for _ in range(12):
        run = forks.start(*command, "--output", output, "trainer.resume=true")
        before = set(checkpoints.glob(".step-*"))
        if run.until(lambda before=before: set(checkpoints.glob(".step-*")) - before):
            run.process.join(generator.uniform(0, 0.004))
        run.kill()
        halves += bool(list(checkpoints.glob(".step-*")))
        for folder in checkpoints.glob("step-*"):  # a folder that has its name is whole
            assert json.loads((folder / "trainer.json").read_text(encoding="utf-8"))["step"] == int(folder.name[5:])
    assert halves >= 3, "no kill struck in the middle of a save"
    swift(*command, "--output", output, "trainer.resume=true").ok()
    assert state(output) == state(whole)
    assert list(checkpoints.glob(".*")) == []


def test_killed_before_the_first_checkpoint(command: list[object], whole: Path, tmp_path: Path, forks: Forks) -> None:
    output = tmp_path / "run"
    run = forks.start(*command, "--output", output, "trainer.save_every=12", "trainer.eval_every=12")
    assert run.until(lambda: (output / "log.jsonl").exists() and len(events(output, "step")) >= 2)
    run.kill()
    assert not list((output / "checkpoints").glob("step-*"))
    again = swift(*command, "--output", output, "trainer.resume=true").ok()
    assert "step 1/12" in again.err
    assert state(output) == state(whole)


def test_a_finished_run_stays_as_it_is(whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(whole, output, symlinks=True)
    resume(output, "--output", output).ok()
    assert state(output) == state(whole)
    assert summary(output)["train_loss"] == summary(whole)["train_loss"]


def test_resume_from_a_named_checkpoint_into_another_folder(command: list[object], whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    swift(*command, "--output", output, f"trainer.resume={checkpoint(whole, 11)}").ok()
    assert [event["step"] for event in events(output, "step")] == [12]
    assert state(output) == state(whole)


def test_full_weights_resume_exactly(tiny_folder: Path, rows: Path, tmp_path: Path) -> None:
    command = ["train", "--model", tiny_folder, "--dataset", rows, "--tuner", "full", THREADS, "trainer.epochs=2",
               "trainer.batch_size=4", "trainer.save_every=1", "trainer.keep=0"]  # fmt: skip
    whole, output = tmp_path / "whole", tmp_path / "run"
    swift(*command, "--output", whole).ok()
    shutil.copytree(whole, output, symlinks=True)
    for step in range(4, 9):
        shutil.rmtree(checkpoint(output, step))
    again = swift(*command, "--output", output, "trainer.resume=true").ok()
    assert "from step 3" in again.err
    for name in ("model", "optimizer", "random-0"):
        file = f"{name}.safetensors"
        assert (checkpoint(output, 8) / file).read_bytes() == (checkpoint(whole, 8) / file).read_bytes()


def test_the_best_checkpoint_is_still_known(command: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run dies after it wrote its best checkpoint, and before the link `best` leads there."""
    from swift_core.rundir import Checkpoints

    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "mark_best", lambda self, step: (_ for _ in ()).throw(KeyboardInterrupt))
        assert swift(*command, "--output", output).code == 1
    assert not (output / "checkpoints" / "best").exists()
    saved = json.loads((checkpoint(output) / "trainer.json").read_text(encoding="utf-8"))
    assert saved["best_step"] == saved["step"]
    # Nothing later is better, so that only the resumed run itself can put the link right.
    resume(output, "--output", output, f"trainer.max_steps={saved['step']}").ok()
    assert (output / "checkpoints" / "best").resolve() == checkpoint(output, saved["step"]).resolve()
