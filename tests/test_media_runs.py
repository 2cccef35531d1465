"""Runs on rows with pictures, sounds, videos and none: one process and two, padded and laid end to end, stopped and resumed."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from support import THREADS, Forks, checkpoint, events, state, summary, swift, write_rows
from swift_plugin_torch.backend import TorchBackend

sys.path.insert(0, str(Path(__file__).parents[1] / "plugins/models/transformers/tests"))
from media_models import MODELS, picture, sound
from omni_model import save_omni

SETTINGS = [THREADS, "tuner.rank=4", "trainer.learning_rate=1e-3", "trainer.save_every=1000", "trainer.shuffle=false"]
SHOWN = ["image", "text", "audio", "text", "text", "text", "image", "video", "text", "audio", "image", "image", "text"]
"""What the rows show, one rank's and the other's by turns: in some steps neither, or only one of them, has any media."""


@pytest.fixture(scope="module")
def omni(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_omni(tmp_path_factory.mktemp("models") / "omni")


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llava"
    tiny = MODELS["llava"]()
    tiny.model.save_pretrained(folder)
    tiny.processor.save_pretrained(folder)
    return folder


def medium(kind: str, folder: Path, number: int) -> str:
    """Writes a file; returns its name."""
    if kind == "image":
        picture(number, (16 + 8 * number, 24)).save(folder / f"{number}.png")
        return f"{number}.png"
    if kind == "audio":
        import soundfile

        made = sound(number, 0.2 + 0.05 * number)
        soundfile.write(folder / f"{number}.wav", made["array"], made["sampling_rate"])
        return f"{number}.wav"
    import av

    with av.open(str(folder / f"{number}.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(4))
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for n in range(8):
            container.mux(stream.encode(av.VideoFrame.from_image(picture(n, (32, 32)))))
        container.mux(stream.encode())
    return f"{number}.mp4"


def write(folder: Path, shown: list[str]) -> Path:
    rows: list[dict[str, Any]] = []
    for number, kind in enumerate(shown):
        question, answer = f"What is {number}?", f"It is {number * number}."
        row: dict[str, Any] = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        if kind != "text":
            row["messages"][0]["content"] = f"<{kind}>{question}"
            row[f"{kind}s"] = [medium(kind, folder, number)]
        rows.append(row)
    return write_rows(folder / "rows.jsonl", rows)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("mixed"), SHOWN)


@pytest.fixture(scope="module")
def command(omni: Path, mixed: Path) -> list[object]:
    media = ["template.media.video_as_images=true", "template.media.max_frames=2"]
    return ["train", "--model", omni, "--dataset", mixed, *SETTINGS, *media, "trainer.epochs=8"]


@pytest.fixture(scope="module")
def one(command: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("one") / "run"
    swift(*command, "trainer.batch_size=2", "--output", output).ok()
    return output


def losses(folder: Path) -> list[float]:
    return [event["loss"] for event in events(folder, "step")]


def test_two_processes_with_mixed_rows_equal_one(command: list[object], one: Path, forks: Forks, tmp_path: Path) -> None:
    """56 steps; rank 1 never sees a sound, and in every epoch each rank has steps without media."""
    forks.start(*command, "--nproc", "2", "trainer.batch_size=1", "--output", tmp_path / "two").wait(240).ok()
    mine, theirs = losses(one), losses(tmp_path / "two")
    assert len(mine) == len(theirs) == 56
    assert theirs == pytest.approx(mine, abs=1e-4)
    assert sum(mine[-7:]) < sum(mine[:7]) - 0.3, "something was learned"


@pytest.mark.parametrize("workers", ["template.media.workers=0", "template.media.prefetch=0"])
def test_threads_and_batches_made_ahead_change_nothing(command: list[object], one: Path, tmp_path: Path, workers: str) -> None:
    swift(*command, "trainer.batch_size=2", workers, "--output", tmp_path / "run").ok()
    assert state(tmp_path / "run") == state(one)


def test_the_thread_of_batches_made_ahead_leaves_its_workers(
    command: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(TorchBackend, "release_threads", lambda self: told.append(threading.current_thread().name))
    swift(*command, "trainer.batch_size=2", "trainer.max_steps=3", "--output", tmp_path / "run").ok()
    assert len(told) >= 3
    assert {name.partition("_")[0] for name in told} == {"ahead"}


def test_a_run_that_is_stopped_and_resumed_ends_the_same(command: list[object], one: Path, tmp_path: Path) -> None:
    """From a checkpoint in the middle of an epoch, as a kill there would leave it."""
    whole, again = [*command, "trainer.batch_size=2", "trainer.save_every=20", "trainer.keep=0"], tmp_path / "again"
    swift(*whole, "--output", again).ok()
    for step in (40, 56):
        shutil.rmtree(checkpoint(again, step))
    (again / "checkpoints" / "last").unlink()
    (again / "checkpoints" / "last").symlink_to("step-20")
    assert "from step 20" in swift(*whole, "--output", again, "trainer.resume=true").ok().err
    assert state(again, 56) == state(one)


def test_rows_with_pictures_laid_end_to_end_give_the_losses_of_padded_ones(llava: Path, tmp_path: Path) -> None:
    data = write(tmp_path, ["image", "text", "image", "image", "text", "text", "image", "text"])
    for name, option in (
        ("flat", "trainer.padding=auto"),
        ("padded", "trainer.padding=always"),
        ("packed", "trainer.packing=true"),
    ):
        size = "trainer.batch_size=1" if name == "packed" else "trainer.batch_size=8"
        more = ["trainer.max_length=1024"] if name == "packed" else []
        done = swift("train", "--model", llava, "--dataset", data, *SETTINGS, "trainer.epochs=6", option, size, *more,
                     "--output", tmp_path / name).ok()  # fmt: skip
        assert "padding the samples" not in done.err
    assert len(losses(tmp_path / "flat")) == 6
    assert losses(tmp_path / "padded") == pytest.approx(losses(tmp_path / "flat"), abs=1e-5)
    assert losses(tmp_path / "packed") == pytest.approx(losses(tmp_path / "flat"), abs=1e-5)


@pytest.mark.parametrize("option", ["stop", "skip"])
def test_a_corrupt_picture_stops_the_run_or_is_skipped_and_counted(llava: Path, tmp_path: Path, option: str) -> None:
    data = write(tmp_path, ["image", "text", "image", "text"])
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:70])
    done = swift("train", "--model", llava, "--dataset", data, *SETTINGS, f"template.media.on_error={option}",
                 "--output", tmp_path / "run")  # fmt: skip
    if option == "stop":
        assert done.code == 2
        assert done.error.startswith(f"{data}:3: image {tmp_path / '2.png'} cannot be read: ")
        return
    done.ok()
    account = json.loads((tmp_path / "run" / "data" / "issues.jsonl").read_text())
    assert (account["where"], account["what"]) == (f"{data}:3", "unreadable media")
    assert "unreadable media" in (tmp_path / "run" / "report.html").read_text()
    assert summary(tmp_path / "run")["steps"] == 1


def test_a_picture_that_is_gone_is_named_before_the_next_run_starts(llava: Path, tmp_path: Path) -> None:
    """Also where the prepared rows are in the cache."""
    data = write(tmp_path, ["image", "text", "image", "text"])
    command = ["train", "--model", llava, "--dataset", data, *SETTINGS, "--output", tmp_path / "run"]
    swift(*command, "trainer.epochs=1").ok()
    (tmp_path / "2.png").unlink()
    done = swift(*command[:-1], tmp_path / "other")
    assert done.code == 2
    assert done.error.startswith(f"{data}:3: image 2.png cannot be read: no such file")
