"""Batches that mix text, pictures and sounds, on two processes as on one; and a picture that cannot be read."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omni_model import save_omni
from support import Forks, events, summary, swift, write_rows

sys.path.insert(0, str(Path(__file__).parents[1] / "plugins/models/transformers/tests"))
from media_models import picture, sound

pytestmark = pytest.mark.slow  # a run of 50 steps takes about as many seconds
STEPS = 50
SETTINGS = ["--tuner", "full", "backend.threads=1", "trainer.learning_rate=4e-3", "trainer.save_every=1000"]
ONE = ["trainer.batch_size=4", f"trainer.max_steps={STEPS}", "trainer.epochs=50"]
TWO = ["--nproc", "2", "trainer.batch_size=2", f"trainer.max_steps={STEPS}", "trainer.epochs=50"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_omni(tmp_path_factory.mktemp("omni") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """16 rows, blocks of a kind first, so that the halves of a step often differ: text, a picture, a sound, both, none."""
    folder = tmp_path_factory.mktemp("media")
    import soundfile

    for number in range(4):
        picture(number, ((40, 24), (24, 60), (64, 20), (16, 16))[number]).save(folder / f"{number}.png")
        heard = sound(number, 0.2 + 0.1 * number)
        soundfile.write(folder / f"{number}.wav", heard["array"], heard["sampling_rate"])
    made = []
    for number in range(4):
        image, audio = str(folder / f"{number}.png"), str(folder / f"{number}.wav")
        made += [
            {"query": f"What is {number}?", "response": f"A number, {number}."},
            {"query": "<image>What is shown?", "response": f"Picture {number}.", "images": [image]},
            {"query": "What is heard?<audio>", "response": f"Sound {number}.", "audios": [audio]},
            {"query": "<image> and <audio>", "response": f"Both {number}.", "images": [image], "audios": [audio]},
        ]
    return sorted(made, key=lambda row: ("audios" in row, "images" in row))


@pytest.fixture(scope="module")
def trained(
    model: Path, rows: list[dict[str, Any]], forks: Forks, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Trains on a data file in a process of its own, once for each name."""
    folder, made = tmp_path_factory.mktemp("runs"), dict[str, Path]()
    file = write_rows(folder / "rows.jsonl", rows)

    def run(name: str, *options: object) -> Path:
        if name not in made:
            forks.start(
                "train", "--model", model, "--dataset", file, *SETTINGS, *options, "--output", folder / name
            ).wait(240).ok()  # fmt: skip
            made[name] = folder / name
        return made[name]

    return run


def losses(folder: Path) -> list[float]:
    return [event["loss"] for event in events(folder, "step")]


def test_two_processes_do_fifty_steps_and_learn(trained: Callable[..., Path]) -> None:
    found = losses(trained("two", *TWO))
    assert len(found) == STEPS
    assert summary(trained("two", *TWO))["steps"] == STEPS
    assert sum(found[-8:]) < 0.7 * sum(found[:8])


def test_two_processes_have_the_losses_of_one(trained: Callable[..., Path]) -> None:
    """Ranks see text alone, pictures alone or sounds alone; weights that one of them did not use are summed all the same."""
    one, two = losses(trained("one", *ONE)), losses(trained("two", *TWO))
    assert two[:10] == pytest.approx(one[:10], rel=1e-4)
    assert two == pytest.approx(one, rel=0.02)  # small differences of sums grow from step to step


@pytest.fixture
def damaged(rows: list[dict[str, Any]], tmp_path: Path) -> tuple[Path, Path]:
    """The rows, the picture of the eleventh cut short, in a file; and that picture."""
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(next(row for row in rows if "images" in row)["images"][0]).read_bytes()[:70])
    text = [row for row in rows if "images" not in row]
    bad = {"query": "<image>What?", "response": "Nothing.", "images": [str(broken)]}
    return write_rows(tmp_path / "rows.jsonl", [*text, *[row for row in rows if "images" in row][:2], bad]), broken


def command(model: Path, file: Path, output: Path) -> list[object]:
    return ["train", "--model", model, "--dataset", file, *SETTINGS, "trainer.max_steps=2", "--output", output]


def test_a_broken_picture_stops_the_run_by_its_row_and_file(model: Path, damaged: tuple[Path, Path], tmp_path: Path) -> None:
    file, broken = damaged
    done = swift(*command(model, file, tmp_path / "run"))
    assert done.code != 0
    assert done.error.startswith(f"{file}:11: image {broken} cannot be read: ")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_broken_picture_is_skipped_and_counted(model: Path, damaged: tuple[Path, Path], tmp_path: Path) -> None:
    file, broken = damaged
    output = tmp_path / "run"
    swift(*command(model, file, output), "template.media.on_error=skip").ok()
    account = json.loads((output / "log.jsonl").read_text(encoding="utf-8").splitlines()[0])["data"]
    assert (account["rows"], account["samples"], account["reasons"]) == (11, 10, {"unreadable media": 1})
    (issue,) = [json.loads(line) for line in (output / "data" / "issues.jsonl").read_text().splitlines()]
    assert issue["where"] == f"{file}:11"
    assert str(broken) in issue["reason"]
