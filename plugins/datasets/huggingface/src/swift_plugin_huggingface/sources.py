"""Finds what a data set's name means: a file, a folder of files, a folder that `datasets` saved, or a hub id.

Nothing is looked for on the hub while something of that name is here, and the datasets library is imported only for
its own folders and for the hub.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift_core.errors import RequestError, did_you_mean

from swift_plugin_huggingface import files
from swift_plugin_huggingface.config import HuggingFaceConfig
from swift_plugin_huggingface.splits import choose_split, parse_split


@dataclass(frozen=True)
class Rows:
    """A source: a function that reads its raw rows from the beginning, and the files they come from, where that is known."""

    read: Callable[[], Iterator[files.Raw]]
    files: Sequence[Path] = ()


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SAVED = ("dataset_dict.json", "state.json")  # what `Dataset.save_to_disk` writes beside its arrow files
SPLIT_WORDS = {
    "train": "train", "training": "train",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
"""Words in the names of files and folders that tell their split, as the hub reads them."""


def open_source(config: HuggingFaceConfig) -> Rows:
    """The source's raw rows, its split chosen, not yet sliced.

    Raises RequestError when there is no such source, when its form is unknown, or when it has no such split.
    """
    path, split = Path(config.path).expanduser(), parse_split(config.split).name
    if config.subset and path.exists():
        raise RequestError(f"dataset {config.path!r} is on this machine; dataset.subset is for hub data sets")
    if path.is_file():
        files.reader_of(path)
        choose_split(["train"], split, config.path)
        return Rows(lambda: files.read_file(path), [path])
    if path.is_dir():
        if any((path / name).is_file() for name in SAVED):
            return _saved(path, split)
        return _folder(path, split)
    if HUB_ID.fullmatch(config.path) and not path.parent.exists() and files.suffix(path) not in files.READERS:
        return _hub(config.path, config.subset, split)
    raise RequestError(f"dataset {config.path!r}: no such file{_near(path) or '.'}")


def _near(path: Path) -> str:
    """How the sentence "no such file" goes on: what may have been meant, or that the folder is missing too."""
    if not path.parent.is_dir():
        return f", and no folder {str(path.parent)!r}."
    near = did_you_mean(path.name, (entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".")))
    if near or len(path.parts) > 1 or files.suffix(path) in files.READERS:
        return near and f".{near}"
    return " or folder, nor an installed data set (see: swift-core datasets list). A hub id reads OWNER/NAME."


def _folder(folder: Path, split: str | None) -> Rows:
    """The data files of a folder and the folders in it, sorted by path. Text files count only where there are no others."""
    inside = [file.relative_to(folder) for file in folder.rglob("*") if file.is_file()]
    visible = [file for file in inside if not any(part.startswith(".") for part in file.parts)]
    seen = [file for file in visible if files.suffix(file) in files.READERS]
    found = sorted(file for file in seen if files.suffix(file) != ".txt") or sorted(seen)
    if not found:
        raise RequestError(f"dataset {str(folder)!r}: the folder holds no data file. Known: {', '.join(files.READERS)}")
    chosen = choose_split(sorted({split_of(file) for file in found}), split, str(folder))
    shards = [folder / file for file in found if split_of(file) == chosen]
    return Rows(lambda: (raw for file in shards for raw in files.read_file(file)), shards)


def split_of(file: Path) -> str:
    """The split that a file's path inside its folder tells: `data/test-00000-of-00002.parquet` -> `test`; else train."""
    for part in reversed((*file.parts[:-1], file.name.partition(".")[0])):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
    return "train"


def _saved(folder: Path, split: str | None) -> Rows:
    import datasets

    try:
        opened = datasets.load_from_disk(str(folder))
    except Exception as err:
        raise RequestError(f"dataset {str(folder)!r} cannot be read: {_line(err)}") from err
    return _library_rows(opened, split, str(folder))


def _hub(name: str, subset: str | None, split: str | None) -> Rows:
    import datasets

    try:
        opened = datasets.load_dataset(name, subset, split=split)
    except Exception as err:  # the libraries below raise a dozen kinds: not found, offline, no such subset or split
        raise RequestError(f"dataset {name!r}: no such file or folder here, and not had from the hub: {_line(err)}") from err
    return _library_rows(opened, split, name)


def _library_rows(opened: Any, split: str | None, name: str) -> Rows:
    """Rows of a Dataset, or of the chosen split of a DatasetDict, as they are stored: pictures stay encoded."""
    if isinstance(opened, dict):
        split = choose_split(list(opened), split, name)
        opened = opened[split]
    shown = f"{name}[{split}]" if split else name
    stored = [Path(file["filename"]) for file in getattr(opened, "cache_files", [])]  # none where it is held in memory
    return Rows(lambda: files.table_rows(opened.with_format("arrow").iter(batch_size=1024), shown), stored)


def _line(err: BaseException) -> str:
    text = " ".join(str(err).split())
    return f"{type(err).__name__}: {text[:300]}"
