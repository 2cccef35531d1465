"""References to media and labels in prepared data: kept, counted, and made anew where a file is not what it was."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from swift_core.errors import RowError
from swift_core.events import EventSink
from swift_core.source import Source
from swift_core.types import Data, Record, Sample
from swift_plugin_prepare.account import Account, fitter
from swift_plugin_prepare.prepare import prepare
from swift_plugin_prepare.store import Store, Writer, pack

MEDIA: dict[str, list[Any]] = {
    "images": ["a/ä b.png", {"bytes": bytes(range(256))}, {"ref": "c.png", "scale": 0.25}],
    "videos": [["1.png", {"bytes": b""}], {"video": "d.mp4", "frame": 3}],
}


class Unreadable(ValueError):
    """What a template raises for a broken file."""

    def __init__(self, reason: str, skip: bool) -> None:
        super().__init__(reason)
        self.skip, self.what = skip, "unreadable media"


class Pictures:
    """A template: the row's picture must be there; each of its bytes is a token."""

    def __init__(self, skip: bool = False) -> None:
        self.skip = skip

    def encode(self, row: dict[str, Any]) -> list[Sample]:
        path = Path(row["image"])
        if not path.is_file():
            raise Unreadable(f"image {path} cannot be read: no such file", self.skip)
        ids = list(path.read_bytes())
        return [Sample(ids, [1.0] * len(ids), text="<image>", media={"images": [str(path)]})]


def stored(folder: Path, samples: list[Sample]) -> Store:
    folder.mkdir()
    writer = Writer(folder)
    writer.add(pack(samples))
    writer.finish()
    return Store(folder, check=True)


def test_a_store_gives_back_media_texts_and_labels(tmp_path: Path) -> None:
    samples = [
        Sample([1, 2], [0.0, 1.0], text="<image> ü", media=MEDIA),
        Sample([3], [1.0]),
        Sample([4], [1.0], label=[0, 1.5, "x"]),
        Sample([5], [1.0], text="b", media={"audios": ["e.wav"]}, label=2),
    ]
    store = stored(tmp_path / "store", samples)
    assert list(store.view("train")) == samples
    assert [store.has_media(n) for n in range(4)] == [True, False, False, True]
    assert store.view("train").first_media() == 0
    assert stored(tmp_path / "plain", samples[1:3]).view("train").first_media() is None


def test_the_digest_tells_other_media_and_labels_apart(tmp_path: Path) -> None:
    kinds = [Sample([1], [1.0]), Sample([1], [1.0], media={"images": ["a"]}), Sample([1], [1.0], label=0),
             Sample([1], [1.0], media={"images": ["b"]})]  # fmt: skip
    digests = {stored(tmp_path / str(n), [sample]).digest for n, sample in enumerate(kinds)}
    assert len(digests) == 4


@pytest.mark.parametrize("overflow", ["truncate-left", "truncate-right", "split", "drop"])
def test_a_sample_with_media_is_dropped_rather_than_cut(overflow: Any) -> None:
    account = Account()
    sample = Sample(list(range(9)), [1.0] * 9, where="a:1", media={"images": ["a.png"]})
    assert fitter(8, overflow, account)(sample) == []
    assert fitter(9, overflow, account)(sample) == [sample]
    assert account.reasons == {"dropped": 1}
    assert account.lost_tokens == {"dropped": 9}


def made(paths: list[Path], template: Any, **options: Any) -> tuple[Data, Account]:
    records = [Record({"image": str(path)}, f"rows.jsonl:{n}") for n, path in enumerate(paths, 1)]
    trainer = SimpleNamespace(max_length=None, overflow="drop")
    return prepare([Source("rows", records)], [], template, trainer, "stop", EventSink(), **options)  # type: ignore[arg-type]


def pictures(folder: Path, *contents: bytes) -> list[Path]:
    paths = [folder / f"{n}.png" for n in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return paths


def test_an_unreadable_file_stops_or_is_skipped_and_counted_as_the_template_says(tmp_path: Path, cache: Path) -> None:
    paths = [*pictures(tmp_path, b"abc"), tmp_path / "gone.png"]
    with pytest.raises(RowError, match=r"rows\.jsonl:2: image .*gone\.png cannot be read: no such file"):
        made(paths, Pictures())
    data, account = made(paths, Pictures(skip=True), folder=tmp_path / "kept")
    assert [sample.input_ids for sample in data.train] == [list(b"abc")]  # type: ignore[union-attr]
    assert account.reasons == {"unreadable media": 1}
    assert "rows.jsonl:2" in (tmp_path / "kept" / "issues.jsonl").read_text()


def test_data_of_files_that_are_gone_or_newer_are_not_taken_from_the_cache(tmp_path: Path, cache: Path) -> None:
    paths = pictures(tmp_path, b"abc", b"defg")
    made(paths, Pictures(), key="k")
    meta = (cache / "k" / "meta.json").stat()
    made(paths, Pictures(), key="k")
    assert (cache / "k" / "meta.json").stat().st_ino == meta.st_ino, "found again"
    paths[0].write_bytes(b"other")
    os.utime(paths[0], (meta.st_mtime + 5, meta.st_mtime + 5))
    data, _ = made(paths, Pictures(), key="k")
    assert data.train[0].input_ids == list(b"other")  # type: ignore[index]
    os.utime(paths[0], (meta.st_mtime - 5, meta.st_mtime - 5))
    paths[1].unlink()
    with pytest.raises(RowError, match=r"rows\.jsonl:2: image .*1\.png cannot be read"):
        made(paths, Pictures(), key="k")
