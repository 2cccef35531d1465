"""Prepared samples on disk, mapped into memory: any number of them costs a reader next to none.

A folder of plain columns, one file each, native byte order: token ids (uint32), loss weights as runs (length uint32, weight
float32), a line of text on each sample's origin, its media and label as JSON, and where each begins (uint64). `meta.json`
holds size and hash of every file and comes last: without it, or with a file that differs, the folder is no store.
"""

from __future__ import annotations

import base64
import hashlib
import json
import mmap
from array import array
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from pathlib import Path
from typing import IO, Any, NamedTuple, overload
from urllib.parse import unquote

from swift_core.errors import RunError
from swift_core.plan import write_json
from swift_core.types import Sample

FORMAT = 2  # raised when the columns change, so that an older cache is not used
RAGGED = {"ids": "I", "runs": "I", "info": "B", "more": "B"}
"""Columns with a number of items for each sample; `weights` has one for each run."""
BYTES = "base64"  # the key under which JSON holds bytes


class Packed(NamedTuple):
    """Samples as the store writes them: bytes to append to each file, and how many items of a ragged column each sample has."""

    data: dict[str, bytes]
    counts: dict[str, array[int]]


def pack(samples: Sequence[Sample]) -> Packed:
    ids, runs, weights, info, more = array("I"), array("I"), array("f"), bytearray(), bytearray()
    rows, trained, counts = array("Q"), array("I"), {name: array("I") for name in RAGGED}
    for sample in samples:
        ids.extend(sample.input_ids)
        counts["ids"].append(len(sample.input_ids))
        found = [(weight, len(list(same))) for weight, same in groupby(sample.weights)]
        weights.extend(weight for weight, _ in found)
        runs.extend(length for _, length in found)
        counts["runs"].append(len(found))
        line = f"{','.join(map(str, sample.turns))} {sample.where}".encode()
        info += line
        counts["info"].append(len(line))
        extra = _extra(sample)
        more += extra
        counts["more"].append(len(extra))
        rows.append(sample.row)
        trained.append(sum(length for weight, length in found if weight))
    columns: dict[str, array[Any]] = {"ids": ids, "runs": runs, "weights": weights, "rows": rows, "trained": trained}
    columns["lengths"] = counts["ids"]
    return Packed(
        {"info": bytes(info), "more": bytes(more)} | {name: column.tobytes() for name, column in columns.items()}, counts
    )


def _extra(sample: Sample) -> bytes:
    """References to media with the text that they stand in, and the label, as JSON; nothing where there are none."""
    held: dict[str, Any] = {"media": sample.media, "text": sample.text} if sample.media else {}
    if sample.label is not None:
        held["label"] = sample.label
    return json.dumps(held, ensure_ascii=False, default=_plain).encode() if held else b""


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return {BYTES: base64.b64encode(value).decode()}
    raise TypeError(f"a sample holds {type(value).__name__}, which cannot be stored")


def _unplain(value: dict[str, Any]) -> Any:
    return base64.b64decode(value[BYTES]) if len(value) == 1 and BYTES in value else value


class Writer:
    """Writes a store into a folder that is there. Only `finish` makes it one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ends = folder, dict.fromkeys(RAGGED, 0)
        self.files: dict[str, IO[bytes]] = {}
        self.hashes: dict[str, Any] = {}
        for name in RAGGED:
            self.write(f"{name}.at", array("Q", [0]).tobytes())

    def write(self, name: str, data: bytes) -> None:
        """Append to a file of the store."""
        if name not in self.files:
            self.files[name], self.hashes[name] = (self.folder / name).open("wb"), hashlib.sha256()
        try:
            self.files[name].write(data)
        except OSError as err:
            raise RunError(
                f"data: {self.folder / name} cannot be written: {err.strerror} (SWIFT_CACHE names another place)"
            ) from err
        self.hashes[name].update(data)

    def add(self, packed: Packed) -> None:
        for name, data in packed.data.items():
            self.write(name, data)
        for name, counts in packed.counts.items():
            ends = array("Q", accumulate(counts, initial=self.ends[name]))
            self.ends[name] = ends[-1]
            self.write(f"{name}.at", ends[1:].tobytes())

    def column(self, name: str, code: str) -> memoryview[Any]:
        """What was written of a file so far."""
        if name not in self.files:
            return memoryview(array(code))
        self.files[name].flush()
        return _mapped(self.folder / name, code)

    def finish(self, **meta: Any) -> None:
        """Write `meta.json`. No fsync: a file that a power cut tears differs from its hash, and is made again."""
        self.close()
        files = {name: [(self.folder / name).stat().st_size, digest.hexdigest()] for name, digest in self.hashes.items()}
        write_json(self.folder / "meta.json", {"format": FORMAT, "files": files, **meta})

    def close(self) -> None:
        for file in self.files.values():
            file.close()


class Store:
    """A finished store. Raises ValueError where it is not whole; `check` also reads and compares all of it."""

    def __init__(self, folder: Path, check: bool = False) -> None:
        self.folder = folder
        try:
            self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            if self.meta["format"] != FORMAT:
                raise ValueError(f"store {folder}: format {self.meta['format']}, expected {FORMAT}")
            for name, (size, digest) in self.meta["files"].items():
                if (folder / name).stat().st_size != size or (check and _hash(folder / name) != digest):
                    raise ValueError(f"store {folder}: {name} is damaged")
        except (OSError, KeyError, TypeError) as err:
            raise ValueError(f"store {folder}: {err}") from None
        self.lengths, self.rows, self.trained = (
            self.column("lengths", "I"),
            self.column("rows", "Q"),
            self.column("trained", "I"),
        )
        self._at = {name: self.column(f"{name}.at", "Q") for name in RAGGED}
        self._ragged = {name: self.column(name, code) for name, code in RAGGED.items()}
        self._weights = self.column("weights", "f")

    def column(self, name: str, code: str) -> memoryview[Any]:
        """A file as numbers of one type; nothing where it is not there."""
        return _mapped(self.folder / name, code) if name in self.meta["files"] else memoryview(array(code))

    @property
    def digest(self) -> str:
        """A hash of the samples, whatever their preparation was called."""
        named = ("lengths", "ids", "runs.at", "runs", "weights", "more", "train", "eval")
        hashes = [self.meta["files"].get(name, ["", ""])[1] for name in named]
        return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.lengths)

    def _bounds(self, name: str, n: int) -> tuple[int, int]:
        return self._at[name][n], self._at[name][n + 1]

    def sample(self, n: int) -> Sample:
        start, stop = self._bounds("ids", n)
        first, last = self._bounds("runs", n)
        begin, end = self._bounds("info", n)
        weights: list[float] = []
        for length, weight in zip(self._ragged["runs"][first:last], self._weights[first:last], strict=True):
            weights += [weight] * length
        turns, _, where = bytes(self._ragged["info"][begin:end]).decode().partition(" ")
        found = [int(turn) for turn in turns.split(",") if turn]
        sample = Sample(self._ragged["ids"][start:stop].tolist(), weights, row=self.rows[n], where=where, turns=found)
        low, high = self._bounds("more", n)
        if low < high:
            held = json.loads(bytes(self._ragged["more"][low:high]), object_hook=_unplain)
            sample.media, sample.text, sample.label = held.get("media", {}), held.get("text", ""), held.get("label")
        return sample

    def has_media(self, n: int) -> bool:
        low, high = self._bounds("more", n)
        return low < high and bytes(self._ragged["more"][low : low + 9]) == b'{"media":'

    def media_changed(self) -> str | None:
        """A file that the samples' media are read from, and that is gone or newer than the store."""
        made = (self.folder / "meta.json").stat().st_mtime
        for n in range(len(self)):
            if self.has_media(n):
                for name in _files(self.sample(n).media):
                    try:
                        if Path(name).expanduser().stat().st_mtime > made:
                            return name
                    except OSError:
                        return name
        return None

    def view(self, split: str) -> View:
        """The samples of `train` or `eval` in their order: the split's own column, else, for `train`, all."""
        if split in self.meta["files"]:
            return View(self, self.column(split, "I"))
        return View(self, range(len(self) if split == "train" else 0))


class View(Sequence[Sample]):
    """`Samples` of a store, in an order of their own."""

    def __init__(self, store: Store, order: Sequence[int]) -> None:
        self.store, self.order = store, order
        whole = isinstance(order, range) and len(order) == len(store)
        self.lengths: Sequence[int] = store.lengths if whole else array("I", map(store.lengths.__getitem__, order))

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, n: int) -> Sample: ...
    @overload
    def __getitem__(self, n: slice) -> list[Sample]: ...
    def __getitem__(self, n: int | slice) -> Sample | list[Sample]:
        if isinstance(n, slice):
            return [self.store.sample(place) for place in self.order[n]]
        return self.store.sample(self.order[n])

    def __iter__(self) -> Iterator[Sample]:
        return (self.store.sample(place) for place in self.order)

    def first_media(self) -> int | None:
        """The first sample with media, if there is one."""
        return next((n for n, place in enumerate(self.order) if self.store.has_media(place)), None)

    @property
    def trained_tokens(self) -> int:
        return sum(map(self.store.trained.__getitem__, self.order))


def _files(value: Any) -> Iterator[str]:
    """The local paths among references."""
    if isinstance(value, str):
        if value.startswith("file://"):
            yield unquote(value.removeprefix("file://"))
        elif "://" not in value and not value.startswith("data:"):
            yield value
    elif isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _files(inner)


def _mapped(path: Path, code: str) -> memoryview[Any]:
    if not path.stat().st_size:  # nothing cannot be mapped
        return memoryview(array(code))
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)).cast(code)  # type: ignore[call-overload,no-any-return]


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
