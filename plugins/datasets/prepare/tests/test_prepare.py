"""The store of prepared samples, its cache, workers, hold-out and weights, and the account of every row."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from swift_core import cache as caching
from swift_core.errors import RequestError, RowError, RunError
from swift_core.events import Event, EventSink
from swift_core.source import Source
from swift_core.testing import PartContract
from swift_core.types import Data, Record, Sample
from swift_plugin_prepare import folders
from swift_plugin_prepare.account import Account, fitter
from swift_plugin_prepare.key import make_key, settings_of, template_content
from swift_plugin_prepare.prepare import fingerprint, prepare
from swift_plugin_prepare.store import Store, Writer, pack
from swift_plugin_prepare.workers import Pool


class TestPreparer(PartContract):
    distribution, id = "swift-plugin-prepare", "preparer/standard"


TRAINER = SimpleNamespace(max_length=None, overflow="drop")


def made(source: Any, template: Any, **options: Any) -> tuple[Data, Account]:
    """`prepare` with defaults. `source` is a data set or a list of sources."""
    sources = source if isinstance(source, list) else [Source("rows", source)]
    given = {
        name: options.pop(name, value) for name, value in {"trainer": TRAINER, "bad_rows": "stop", "evaluation": []}.items()
    }
    events = options.pop("events", EventSink())
    return prepare(sources, given["evaluation"], template, given["trainer"], given["bad_rows"], events, **options)


def contents(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


# --- the store --------------------------------------------------------------------------------------------------------


def test_store_gives_back_what_it_was_given(tmp_path: Path) -> None:
    samples = [
        Sample([5, 6, 7, 4_000_000_000], [0.0, 0.5, 0.5, 2.0], row=0, where="ä b.jsonl:1", turns=[1, 3]),
        Sample([9], [1.0], row=2**40, where=""),
        Sample([1, 2], [0.0, 0.0], row=2**40 + 1, where="two\nlines 3", turns=[0]),
    ]
    writer = Writer(tmp_path)
    writer.add(pack(samples[:1]))
    writer.add(pack([]))
    writer.add(pack(samples[1:]))
    writer.finish()
    view = Store(tmp_path, check=True).view("train")
    assert (list(view), view[1:], view[-1], len(view)) == (samples, samples[1:], samples[2], 3)
    assert list(view.lengths) == [4, 1, 2]
    assert list(view.store.trained) == [3, 1, 0]
    with pytest.raises(IndexError):
        view[3]
    assert list(Store(tmp_path).view("eval")) == []


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "no meta", "half meta", "format"])
def test_a_damaged_store_is_made_again(damage: str, rows: Callable[..., Any], template: Any, cache: Path) -> None:
    source = rows(20)
    whole = list(made(source, template, key="k")[0].train)
    before = contents(cache / "k")
    file = cache / "k" / ("meta.json" if "meta" in damage or damage == "format" else "ids")
    data = file.read_bytes()
    if damage in ("remove", "no meta"):
        file.unlink()
    else:
        changed = {"flip": data[:9] + bytes([data[9] ^ 1]) + data[10:], "format": data.replace(b'"format": 2', b'"format": 0')}
        file.write_bytes(changed.get(damage, data[: len(data) // 2]))
        assert file.read_bytes() != data
    assert list(made(source, template, key="k")[0].train) == whole
    assert contents(cache / "k") == before
    assert [path.name for path in cache.iterdir()] == ["k"]


def test_a_second_run_does_not_encode(rows: Callable[..., Any], template: Any, cache: Path) -> None:
    source, said = rows(30), list[Event]()
    first, account = made(source, template, key="k", holdout=4)
    events = EventSink()
    events.add(said.append)
    again, same = made(source, None, key="k", holdout=4, events=events)  # no template: it is not asked
    assert (list(again.train), list(again.eval), again.account) == (list(first.train), list(first.eval), first.account)
    assert same.summary() == account.summary()
    assert fingerprint(again) == fingerprint(first)
    assert [event.data["text"] for event in said] == [f"data: 26 samples from the cache {cache / 'k'}"]


def test_data_without_a_key_outlives_its_folder(rows: Callable[..., Any], template: Any, cache: Path) -> None:
    data, _ = made(rows(3), template)
    assert list(cache.iterdir()) == []
    assert [bytes(sample.input_ids) for sample in data.train] == [b"q1a1\0", b"q2aa2\0", b"q3aaa3\0"]


@dataclass
class Options:
    columns: str = "a"
    file: str | None = None


def chosen_by(columns: str = "a", version: str = "1", plugin: str = "none", file: Path | None = None) -> Any:
    """A resolved component, as the session makes it."""
    contribution = SimpleNamespace(
        id="rows", entry=SimpleNamespace(requires=["pytest>=1"]), plugin=SimpleNamespace(name=plugin, version=version)
    )
    return SimpleNamespace(contribution=contribution, options=Options(columns, file and str(file)))


def test_options_count_with_the_files_and_libraries_that_they_name(tmp_path: Path) -> None:
    file = tmp_path / "system.txt"
    file.write_text("Be brief.")
    first = settings_of(chosen_by(file=file), {"pytest": "8", "click": "1"})
    assert settings_of(chosen_by(file=file), {"pytest": "8", "click": "2"}) == first
    assert settings_of(chosen_by(file=file), {"pytest": "9", "click": "1"}) != first
    file.write_text("Be long!!")
    assert settings_of(chosen_by(file=file), {"pytest": "8", "click": "1"}) != first


def test_the_key_changes_with_all_that_decides(rows: Callable[..., Any], template: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_text("weights")
    trainer = SimpleNamespace(max_length=10, overflow="drop", learning_rate=1.0)

    def key(**changed: Any) -> str | None:
        source = Source("rows.txt", changed.pop("dataset", Rows), component=changed.pop("component", chosen_by()))
        for name in ("sample", "weight", "evaluation"):
            setattr(source, name, changed.pop(name, getattr(source, name)))
        options = SimpleNamespace(**{**vars(trainer), **{n: changed.pop(n) for n in list(changed) if hasattr(trainer, n)}})
        chosen = [changed.pop("template", "chatml"), template_content(template, folder)]
        return make_key(
            [source], chosen, options, changed.get("bad_rows", "stop"), changed.get("holdout", 0.0), changed.get("seed", 1), {}
        )

    Rows = rows(5)
    first = key()
    assert isinstance(first, str)
    assert key() == first
    os.utime(Rows.path)
    (folder / "model.safetensors").write_text("other weights")
    assert {key(learning_rate=2.0), key(seed=2)} == {first}  # what does not decide
    changes: list[dict[str, Any]] = [
        *({"component": other} for other in (chosen_by("b"), chosen_by(version="2"), chosen_by(plugin="pytest"))),
        {"sample": 3}, {"weight": 2.0}, {"evaluation": True}, {"max_length": 11},
        {"overflow": "truncate-left"}, {"template": "other"}, {"bad_rows": "skip"}, {"holdout": 0.5}, {"sample": 3, "seed": 2},
        {"dataset": rows(5, "copy.txt")},
    ]  # fmt: skip
    keys = [key(**change) for change in changes]
    (folder / "tokenizer.json").write_text('{"a": 1}')
    keys.append(key())
    (folder / "tokenizer.json").write_text("{}")
    rows(6)
    keys.append(key())
    assert len({first, *keys}) == 1 + len(keys)
    assert key(dataset=[Record({}, "x")]) is None  # its content is not known
    assert template_content(template, None) is None
    own = SimpleNamespace(fingerprint=lambda: "mine")
    assert template_content(own, None) == "types.SimpleNamespace mine"


def test_a_large_file_is_known_by_blocks_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "WHOLE", 1000)
    monkeypatch.setattr(caching, "BLOCK", 10)
    file = tmp_path / "large"
    file.write_bytes(bytes(5000))
    os.utime(file, ns=(1, 1))
    first = caching.fingerprint([file])
    os.utime(file, ns=(1, 2))
    assert caching.fingerprint([file]) != first
    file.write_bytes(bytes(4990) + b"x" * 10)
    os.utime(file, ns=(1, 1))
    assert caching.fingerprint([file]) != first
    file.write_bytes(bytes(5000))
    os.utime(file, ns=(1, 1))
    assert caching.fingerprint([file]) == first


def test_the_cache_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*names: str) -> None:
        for age, name in enumerate(names):
            (tmp_path / name).mkdir()
            (tmp_path / name / "ids").write_bytes(bytes(100))
            os.utime(tmp_path / name, (age, age))

    fill("a", "b", "c", "d")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    node = os.uname().nodename
    for hidden in (f".{node}-{dead.pid}-1", f".{node}-{os.getpid()}-1", f".elsewhere-{dead.pid}-1"):
        (tmp_path / hidden).mkdir()
    monkeypatch.setattr(folders, "KEPT_BYTES", 250)
    folders.prune(tmp_path, tmp_path / "a")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "c", "d", f".{node}-{os.getpid()}-1", f".elsewhere-{dead.pid}-1"}
    monkeypatch.setattr(folders, "KEPT_FOLDERS", 1)
    folders.prune(tmp_path)
    assert {path.name for path in tmp_path.glob("[!.]*")} == {"d"}


def test_a_cache_that_cannot_be_written_is_told(template: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SWIFT_CACHE", str(tmp_path / "file"))
    with pytest.raises(RequestError, match=r"^cache .*/file/data cannot be written to: .*; SWIFT_CACHE names another place$"):
        made([Record({"q": "a", "a": "b"}, "x")], template)


# --- workers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(workers: int, rows: Callable[..., Any], template: Any, cache: Path) -> None:
    source = [Source("rows", rows(1000, bad=(5, 700)), weight=1.5), Source("more", rows(130, "more.txt"))]
    made(source, template, workers=0, key="alone", bad_rows="skip", holdout=0.1)
    made(source, template, workers=workers, key="together", bad_rows="skip", holdout=0.1)
    assert contents(cache / "together") == contents(cache / "alone")


def test_the_first_bad_row_is_named_whoever_meets_it(rows: Callable[..., Any], template: Any) -> None:
    source = rows(1000, bad=(900, 300))
    for workers in (0, 3):
        with pytest.raises(RowError) as caught:
            made(source, template, workers=workers)
        assert (caught.value.where, caught.value.reason) == (
            "rows.txt:300", "no tab (bad_rows=skip leaves such rows out, and counts them)"
        )  # fmt: skip


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fault_of_the_template_names_the_row(workers: int, rows: Callable[..., Any], template: Any) -> None:
    class Faulty:
        def encode(self, row: dict[str, Any]) -> list[Sample]:
            return [] if row["q"] == "q290" and row["none"] else template.encode(row)

    with pytest.raises(RunError, match=r"^rows.txt:290: the template failed on this row: KeyError: 'none'$"):
        made(rows(1000), Faulty(), workers=workers)


def test_a_killed_worker_is_one_line_and_ends_the_others(rows: Callable[..., Any], template: Any, tmp_path: Path) -> None:
    log = tmp_path / "pids"
    log.touch()

    class Dying:
        def encode(self, row: dict[str, Any]) -> list[Sample]:
            with log.open("a") as file:
                file.write(f"{os.getpid()}\n")
            if row["q"] == "q300":
                os.kill(os.getpid(), signal.SIGKILL)
            return template.encode(row)  # type: ignore[no-any-return]

    with pytest.raises(RunError, match=r"^data: a process that prepares rows was killed: .* \(data_workers=0 does without"):
        made(rows(2000), Dying(), workers=3)
    pids = {int(line) for line in log.read_text().split()}
    assert len(pids) == 3
    assert os.getpid() not in pids
    assert not any(alive(pid) for pid in pids)


def test_few_rows_start_no_process() -> None:
    with Pool(lambda chunk: os.getpid(), None) as pool:
        assert set(pool.map(range(15))) == {os.getpid()}
    with Pool(lambda chunk: (chunk, os.getpid()), 2) as pool:
        found = list(pool.map(range(5)))
    assert [number for number, _ in found] == [0, 1, 2, 3, 4]
    assert len({pid for _, pid in found} - {os.getpid()}) == 2


SLOW = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace
from swift_core.source import Source
from swift_plugin_prepare.prepare import prepare
from swift_core.events import EventSink
from swift_core.types import Record, Sample

class Slow:
    def encode(self, row):
        time.sleep(0.001)
        os.write(1, f"{os.getpid()}\\n".encode())
        return [Sample([1, 2], [0.0, 1.0])]

rows = [Record({}, f"x:{n}") for n in range(100_000)]
prepare([Source("rows", rows)], [], Slow(), SimpleNamespace(), "stop", EventSink(), workers=2, key="k")
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stop_leaves_nothing_half_made(number: int, cache: Path, rows: Callable[..., Any], template: Any) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    assert process.stdout
    pids = {int(process.stdout.readline()) for _ in range(400)}
    assert len(pids) == 2
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # Ctrl-C reaches all of them
    else:
        process.kill()
    process.stdout.close()
    process.wait(10)
    end = time.monotonic() + 10
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < end, "a worker outlived its parent"
        time.sleep(0.01)
    assert not (cache / "k").exists()
    assert len(list(cache.glob(".*"))) == (1 if number == signal.SIGKILL else 0)
    assert len(made(rows(3), template, key="k")[0].train) == 3
    assert [path.name for path in cache.iterdir()] == ["k"]


# --- choice of rows ---------------------------------------------------------------------------------------------------


def test_hold_out_samples_and_weights(rows: Callable[..., Any], template: Any, tmp_path: Path) -> None:
    """The seed chooses as `random.sample` does, by number of the row; what is not chosen is not encoded."""
    log = tmp_path / "log"
    template.log = log
    sources = [Source("rows", rows(50), sample=20, weight=2.5), Source("more", rows(10, "more.txt"), weight=2.5)]
    data, account = made(sources, template, holdout=6, seed=7)
    drawn = [f"rows.txt:{n + 1}" for n in sorted(random.Random(7).sample(range(50), 20))]
    drawn += [f"more.txt:{n}" for n in range(1, 11)]
    held = sorted(random.Random(7).sample(range(30), 6))
    kept = [where for n, where in enumerate(drawn) if n not in held]
    extra = sorted(random.Random(7).sample(range(24), 12))
    assert [sample.where for sample in data.eval] == [drawn[n] for n in held]
    assert [sample.row for sample in data.eval] == held
    assert [sample.where for sample in data.train] == kept * 2 + [kept[n] for n in extra]
    assert (account.rows, account.samples) == (60, 60)
    assert account.tokens == sum(data.train.lengths) == sum(len(sample.input_ids) for sample in data.train)  # type: ignore[union-attr]
    assert account.trained_tokens == sum(sample.trained_tokens for sample in data.train)  # type: ignore[union-attr]
    assert data.account["eval"]["rows"] == 6
    assert len(log.read_text().splitlines()) == 30


def test_samples_of_one_row_stand_on_one_side(rows: Callable[..., Any], template: Any) -> None:
    class Twice:
        def encode(self, row: dict[str, Any]) -> list[Sample]:
            return template.encode(row) * 1 + template.encode({**row, "a": "again"})  # type: ignore[no-any-return]

    data, _ = made([Source("rows", rows(40), weight=1.25)], Twice(), holdout=0.25)
    train, held = ([sample.row for sample in split] for split in (data.train, data.eval))  # type: ignore[union-attr]
    assert not set(train) & set(held)
    assert (len(held), len(set(held)), len(set(train))) == (20, 10, 30)
    assert len(train) == 2 * (30 + 8)  # a quarter of 30 rows once more, to the even number
    assert all(train.count(row) in (2, 4) for row in set(train))


def test_rows_of_their_own_to_evaluate_on(rows: Callable[..., Any], template: Any) -> None:
    held = [Source("held", rows(4, "held.txt"), evaluation=True)]
    data, account = made(rows(5), template, evaluation=held, holdout=0.5)
    assert [sample.where for sample in data.eval] == [f"held.txt:{n}" for n in range(1, 5)]
    assert (len(data.train), account.rows, data.account["eval"]["rows"]) == (5, 5, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"holdout": 9}, "holdout: 9 rows kept back of 9 leave none to train on"),
        ({"holdout": -1}, "holdout: expected a share below 1 or a count, not -1"),
        ({"trainer": SimpleNamespace(max_length=2)}, "dataset: no row is left to train on (9 dropped of 9 rows)"),
    ],
)
def test_nothing_to_train_on(options: dict[str, Any], message: str, rows: Callable[..., Any], template: Any) -> None:
    with pytest.raises(RequestError) as caught:
        made(rows(9), template, **options)
    assert str(caught.value) == message


def test_an_empty_data_set(rows: Callable[..., Any], template: Any, tmp_path: Path) -> None:
    full = rows(1)
    (tmp_path / "none.txt").touch()
    empty = type(full)(tmp_path / "none.txt")
    with pytest.raises(RequestError, match=r"^dataset 'rows' is empty: it has no rows$"):
        made(empty, template)
    with pytest.raises(RequestError, match=r"^eval_dataset 'none' is empty: it has no rows$"):
        made(full, template, evaluation=[Source("none", empty, evaluation=True)])


# --- the account ------------------------------------------------------------------------------------------------------


def test_account_by_hand(template: Any, cache: Path) -> None:
    """Two rows fit into ten tokens, one is two too long and one four; one has no tab."""
    table = [("qqqq", "aa"), ("qqqq", "aaaaaaa"), ("q", "aaaaaaaa"), ("qqqq", "aaaaaaaaa")]
    records = [Record({"q": q, "a": a}, f"f:{n}") for n, (q, a) in enumerate(table, 1)]
    records.append(Record({}, "f:5", "no tab"))
    lengths = {1: 7, 2: 12, 3: 10, 4: 14}
    cases: dict[str, tuple[list[int], dict[str, int], dict[str, int]]] = {
        "drop": ([7, 10], {"dropped": 2, "refused": 1}, {"dropped": 26, "refused": 0}),
        "truncate-right": ([7, 10, 10, 10], {"answer cut": 2, "refused": 1}, {"answer cut": 6, "refused": 0}),
        "truncate-left": ([7, 10, 10, 10], {"cut": 2, "refused": 1}, {"cut": 6, "refused": 0}),
        "split": ([7, 10, 2, 10, 10, 4], {"split": 2, "refused": 1}, {"split": 0, "refused": 0}),
    }
    for overflow, (kept, reasons, lost) in cases.items():
        trainer = SimpleNamespace(max_length=10, overflow=overflow)
        data, account = prepare(records, [], template, trainer, "skip", EventSink(), key=overflow)
        assert list(data.train.lengths) == kept  # type: ignore[union-attr]
        assert (account.rows, account.samples, account.tokens) == (5, len(kept), sum(kept))
        assert (dict(account.reasons), dict(account.lost_tokens)) == (reasons, lost)
        assert data.account == {**account.summary(), "eval": Account().summary()}
        issues = [json.loads(line) for line in (cache / overflow / "issues.jsonl").read_text().splitlines()]
        assert [issue["where"] for issue in issues] == ["f:2", "f:4", "f:5"]
        for issue, row in zip(issues[:2], (2, 4), strict=True):
            assert issue["what"] in reasons
            assert issue["reason"].startswith(f"{lengths[row]} tokens, max_length 10")
            assert issue["tokens"] == {"drop": lengths[row], "split": 0}.get(overflow, lengths[row] - 10)
        assert issues[2] == {"where": "f:5", "what": "refused", "reason": "no tab", "tokens": 0}
        trained = sum(sample.trained_tokens for sample in data.train)  # type: ignore[union-attr]
        whole = 3 + 8 + 9 + 10
        assert account.trained_tokens == trained == whole - {"drop": 18, "truncate-right": 6}.get(overflow, 0)
    assert account.notes == {}


def test_a_cut_answer_tells_that_its_end_is_lost() -> None:
    sample, account = Sample([1, 2, 3, 4, 5], [0.0, 0.0, 1.0, 1.0, 1.0], where="f:1"), Account()
    assert [piece.input_ids for piece in fitter(4, "truncate-right", account)(sample)] == [[1, 2, 3, 4]]
    assert [piece.input_ids for piece in fitter(2, "truncate-left", account)(sample)] == [[4, 5]]
    assert fitter(2, "truncate-right", account)(sample) == []
    assert [(issue["what"], issue["reason"]) for issue in account.issues] == [
        ("answer cut", "5 tokens, max_length 4: 1 trained tokens lost, the end of the last answer with them"),
        ("answer cut", "5 tokens, max_length 2: 1 trained tokens lost"),
        ("dropped", "5 tokens, max_length 2: no trained token is left after truncate-right"),
    ]


def test_notes_and_the_eval_side_are_counted(cache: Path) -> None:
    class Noted:
        def encode(self, row: dict[str, Any]) -> list[Sample]:
            marked = {"appended": "<end>"} if row["n"] == 1 else {}
            return [Sample([1, 2], [0.0, 1.0], notes=["own-sample", "own-sample"][: row["n"]], **marked)]

    records = [Record({"n": n}, f"f:{n}") for n in range(4)]
    held = [Record({}, "e:1", "bad"), Record({"n": 1}, "e:2")]
    data, account = prepare(records, held, Noted(), TRAINER, "skip", EventSink(), key="k")  # type: ignore[arg-type]
    assert dict(account.notes) == {"own-sample": 3, "appended": 1}
    assert data.account["eval"]["notes"] == {"own-sample": 1, "appended": 1}
    assert (account.reasons, data.account["eval"]["reasons"]) == ({}, {"refused": 1})
    (issue,) = (json.loads(line) for line in (cache / "k" / "issues.jsonl").read_text().splitlines())
    assert issue == {"where": "e:1", "what": "refused", "reason": "bad", "tokens": 0, "split": "eval"}


def test_the_fingerprint_is_that_of_ids_weights_and_order(rows: Callable[..., Any], template: Any) -> None:
    source = rows(30)
    first = fingerprint(made(source, template)[0])
    assert fingerprint(made(source, template, workers=2)[0]) == first
    assert fingerprint(made(rows(30, "copy.txt"), template)[0]) == first  # wherever it lies
    others = [made(source, template, holdout=3), made([Source("x", source, weight=2)], template), made(rows(31), template)]
    assert len({first, *(fingerprint(data) for data, _ in others)}) == 4


def test_lengths_are_numbers_and_not_samples(rows: Callable[..., Any], template: Any) -> None:
    data, _ = made(rows(10), template, holdout=2)
    assert isinstance(data.eval.lengths, array)
    assert list(data.train.lengths) == [len(sample.input_ids) for sample in data.train]  # type: ignore[union-attr]
