"""The multimodal example: its data and model always, the run that learns to read among the slow tests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import swift

sys.path.insert(0, str(Path(__file__).parents[1] / "examples/digits"))
import strips
import tiny_model

DIGITS = Path(strips.__file__).parent
pytest.importorskip("sklearn", reason="the digits come from scikit-learn: pip install scikit-learn")


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    strips.write(folder, 60, 30)
    return folder


def test_held_out_digits_are_never_trained_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn: list[strips.Strip] = []
    real = strips.draw
    monkeypatch.setattr(strips, "draw", lambda strip, images: (drawn.append(strip), real(strip, images))[1])
    strips.write(tmp_path, 300, 100)
    seen = [{number for strip in part for number in strip.digits} for part in (drawn[:300], drawn[300:])]
    assert len(drawn) == 400
    assert not seen[0] & seen[1]
    assert len(seen[1]) <= strips.HELD_OUT
    assert {len(strip.digits) for strip in drawn[300:]} == {2, 3, 4}


def test_pictures_show_what_rows_say(data: Path) -> None:
    """Each answer against the labels of the digits in its strip; swapped rows keep their questions and answers."""
    from PIL import Image

    held, swapped, blank = (rows(data / f"{name}.jsonl") for name in ("heldout", "swapped", "blank"))
    assert [row["conversations"] for row in held] == [row["conversations"] for row in swapped] == [
        row["conversations"] for row in blank
    ]  # fmt: skip
    assert all(row["image"] != other["image"] for row, other in zip(held, swapped, strict=True))
    assert sorted(row["image"] for row in held) == sorted(row["image"] for row in swapped)
    assert Image.open(data / "pictures" / "blank.png").getextrema() == (0, 0)
    for row in held:
        picture = Image.open(data / row["image"])
        assert picture.size == (strips.SIDE, strips.SIDE)
        asked, said = (turn["value"] for turn in row["conversations"])
        inked = [
            picture.crop((x, y, x + strips.CELL, y + strips.CELL)).getextrema()[1] > 100
            for y in range(0, strips.SIDE, strips.CELL) for x in range(0, strips.SIDE, strips.CELL)
        ]  # fmt: skip
        if asked.endswith(strips.READ):
            assert sum(inked) == len(said)
        else:
            assert asked.endswith(strips.LARGEST)
            assert len(said) == 1


def test_the_model_trains_from_the_command(data: Path, tmp_path: Path) -> None:
    """Two steps, from the example's own configuration, and an answer."""
    assert 1_000_000 < tiny_model.save(tmp_path / "model") < 5_000_000
    done = swift(
        "train", DIGITS / "digits.yaml", "--model", tmp_path / "model", "--dataset", data / "train.jsonl", "--output",
        tmp_path / "run", "trainer.max_steps=2", "trainer.batch_size=4",
    )  # fmt: skip
    done.ok()
    answers = tmp_path / "answers.jsonl"
    swift(
        "infer",
        "--model",
        tmp_path / "run",
        "--dataset",
        f"{data / 'heldout.jsonl'}#2",
        "--output",
        answers,
        "--max-tokens",
        "4",
    ).ok()
    assert [len(row["images"]) for row in rows(answers)] == [1, 1]


@pytest.mark.slow
def test_it_learns_to_read_and_needs_the_picture(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, DIGITS / "main.py", tmp_path / "digits"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads((tmp_path / "digits" / "figures.json").read_text(encoding="utf-8"))
    print(done.stdout[-600:])
    found = figures["exact_match"]
    assert min(found["heldout"].values()) > 0.9
    assert found["swapped"][strips.READ] < 0.05  # chance: three digits alike
    assert found["blank"][strips.READ] < 0.05
    assert max(found["swapped"][strips.LARGEST], found["blank"][strips.LARGEST]) < 0.4  # always 9 is right for a quarter
    assert sum(figures["seconds"].values()) < 300
