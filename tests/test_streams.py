"""Streams and prepared data end to end: resumed exactly, by other workers and several processes, and read from any form."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest
from support import THREADS, Forks, environment, state, summary, sums, swift, write_rows

PLAIN = ["backend.device=cpu", THREADS, "trainer.learning_rate=1e-2", "trainer.batch_size=2"]
STREAM = [*PLAIN, "stream=true", "window=5", "trainer.max_steps=12", "trainer.save_every=1", "trainer.keep=0", "bad_rows=skip"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, with an empty user's cache in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SWIFT_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def talk(folder: Path) -> Path:
    """13 rows, of which the fourth and the twelfth cannot be used. A step takes two: the source is read nearly twice."""
    rows = sums(1, 13)
    rows[3], rows[11] = {"foo": 1}, {"foo": 2}
    return write_rows(folder / "talk.jsonl", rows)


def issues(run: str) -> list[str]:
    lines = Path(run, "data", "issues.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["where"].rpartition(":")[2] for line in lines]


@pytest.mark.parametrize("packing", ["false", "true"])
def test_a_killed_stream_goes_on_where_it_was(packing: str, talk: Path, tiny_folder: Path, forks: Forks) -> None:
    command = ["train", "--model", tiny_folder, "--dataset", talk, *STREAM]
    command += [f"trainer.packing={packing}", "trainer.max_length=128"]
    swift(*command, "--output", "whole").ok()
    with environment(SWIFT_CACHE=str(Path("cache").resolve())):
        killed = forks.start(*command, "--output", Path("killed").resolve())
        assert killed.until(lambda: Path("killed/checkpoints/step-4/adapter_model.safetensors").exists())
        killed.kill()
    swift("train", "killed/config.yaml", "trainer.resume=true", "data_workers=2").ok()
    assert state(Path("killed")) == state(Path("whole"))
    assert issues("killed") == issues("whole") == ["4", "12"]
    read = summary(Path("killed"))["data"]
    assert (read["rows"], read["samples"], read["reasons"]) == (13, 11, {"refused": 2})
    assert read == summary(Path("whole"))["data"]


def test_ranks_read_one_stream(talk: Path, tiny_folder: Path) -> None:
    """Two processes with a row each take the steps that one takes with two."""
    command = ["train", "--model", tiny_folder, "--dataset", talk, *STREAM]
    command += ["trainer.schedule=constant", "trainer.shuffle=false"]
    swift(*command, "--output", "one").ok()
    swift(*command, "--output", "two", "--nproc", "2", "trainer.batch_size=1").ok()
    assert issues("two") == issues("one") == ["4", "12"]
    one, two = (summary(Path(name)) for name in ("one", "two"))
    assert two["data"] == one["data"]
    assert two["trained_tokens"] == one["trained_tokens"]
    assert two["train_loss"] == pytest.approx(one["train_loss"], abs=1e-4)
    assert not list(Path("cache/data").glob(".*")), "windows are removed at the end"


def test_what_a_stream_asks_for(talk: Path, tiny_folder: Path) -> None:
    command = ["train", "--model", tiny_folder, "--dataset", talk, "--output", "out", *STREAM]
    for change, message in {
        "trainer.max_steps=null": "stream: how long it is, is not known beforehand; set trainer.max_steps",
        "holdout=0.5": "holdout: of a stream the first rows are kept back; expected a count, not 0.5",
        "dataset.sample=3": f"stream: dataset '{talk}' cannot be sampled at random; "
        "take the first rows with dataset.split=[:N]",
        "window=0": "window: expected at least 1, not 0",
        "data_workers=-1": "data_workers: expected at least 0, not -1",
    }.items():
        done = swift(*command, change)
        assert (done.error, done.code) == (message, 2)
    assert not Path("out").exists()


def test_the_first_rows_of_a_stream_are_held_out(talk: Path, tiny_folder: Path) -> None:
    done = swift("train", "--model", tiny_folder, "--dataset", talk, "--output", "out", *STREAM, "holdout=4").ok()
    assert "data: a stream, 5 rows a window; 3 samples to evaluate on" in done.err.splitlines()
    read = summary(Path("out"))
    assert (read["data"]["rows"], read["data"]["rows_to"], read["data"]["reasons"]) == (9, 13, {"refused": 1})
    assert read["eval_loss"] > 0
    assert issues("out") == ["4", "12"]


def test_any_form_is_streamed(folder: Path, tiny_folder: Path) -> None:
    """The same rows in each form give the same weights: a folder of shards, gz, csv, parquet."""
    import pyarrow
    from pyarrow import parquet

    rows = [{"query": f"What is {n}?", "response": "." * (n % 4) + str(n)} for n in range(12)]
    Path("shards").mkdir()
    write_rows(Path("shards/train-0.jsonl"), rows[:5])
    write_rows(Path("shards/train-1.jsonl"), rows[5:])
    with gzip.open("rows.jsonl.gz", "wt") as packed:
        packed.write("".join(json.dumps(row) + "\n" for row in rows))
    with Path("rows.csv").open("w", newline="") as table:
        writer = csv.DictWriter(table, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), "rows.parquet")
    found = set()
    for name in ("shards", "rows.jsonl.gz", "rows.csv", "rows.parquet"):
        swift(
            "train", "--model", tiny_folder, "--dataset", name, "--output", f"out-{name}", *STREAM, "trainer.max_steps=4"
        ).ok()
        found.add(state(Path(f"out-{name}")))
    assert len(found) == 1


def test_a_second_run_finds_its_samples(talk: Path, tiny_folder: Path) -> None:
    """Whatever else changed; another length is other data. `--nproc` maps the same files."""
    command = ["train", "--model", tiny_folder, "--dataset", talk, *PLAIN, "bad_rows=skip", "trainer.max_steps=2", "--output"]
    first = swift(*command, "a", "holdout=0.1").ok()
    (stored,) = Path("cache/data").iterdir()
    said = (
        f"data: {json.loads(Path('a/log.jsonl').read_text().partition(chr(10))[0])['data']['samples']} samples from the cache"
    )
    assert said not in first.err
    again = swift(*command, "b", "holdout=0.1", "trainer.learning_rate=1e-3", "--tuner", "full", "--nproc", "2").ok()
    assert f"{said} {stored.resolve()}" in again.err.splitlines()
    assert issues("b") == issues("a") == ["4", "12"]
    assert Path("b/data/place.json").is_file()
    assert said not in swift(*command, "c", "holdout=0.1", "trainer.max_length=100").ok().err
    with talk.open("a") as file:
        file.write(json.dumps(sums(99, 1)[0]) + "\n")
    assert "from the cache" not in swift(*command, "d", "holdout=0.1").ok().err


@pytest.mark.parametrize("packing", ["false", "true"])
def test_prepared_data_resumes_in_the_middle_of_an_epoch(packing: str, talk: Path, tiny_folder: Path) -> None:
    command = [
        "train",
        "--model",
        tiny_folder,
        "--dataset",
        talk,
        *PLAIN,
        "bad_rows=skip",
        "trainer.epochs=2",
        "trainer.keep=0",
    ]
    command += [f"trainer.packing={packing}", "trainer.max_length=128", "trainer.save_every=1", "dataset.weight=1.5"]
    swift(*command, "--output", "whole").ok()
    swift(*command, "--output", "part").ok()
    for later in [path for path in Path("part/checkpoints").glob("step-*") if int(path.name[5:]) > 2]:
        for file in later.iterdir():
            file.unlink()
        later.rmdir()
    swift("train", "part/config.yaml", "trainer.resume=true", "data_workers=3").ok()
    assert state(Path("part")) == state(Path("whole"))
