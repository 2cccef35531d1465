"""From sources to prepared data: rows chosen, encoded in order, written to disk once, and found again in the user's cache.

All of it is torch-free, and done before any rank starts. The ranks of a run map the same files.
"""

from __future__ import annotations

import json
import os
import shutil
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import compress, islice
from pathlib import Path
from typing import Any

from swift_core.cache import cache_folder
from swift_core.errors import RequestError
from swift_core.events import EventSink
from swift_core.rundir import put_in_place
from swift_core.source import Source
from swift_core.types import Data, Record, Template

from swift_plugin_prepare.account import Account, Overflow
from swift_plugin_prepare.encode import Chunk, Encoded, Encoder
from swift_plugin_prepare.folders import prune, working_folder
from swift_plugin_prepare.rows import Span, hold_out, order
from swift_plugin_prepare.store import Store, Writer
from swift_plugin_prepare.workers import Pool

CHUNK = 128  # rows that one process encodes at a time


def make_encoder(sources: Sequence[Source], template: Template, trainer_config: Any, bad_rows: str) -> Encoder:
    length = getattr(trainer_config, "max_length", None)
    overflow: Overflow = getattr(trainer_config, "overflow", "drop")
    return Encoder(sources, template, length, overflow, bad_rows == "skip")


def prepare(
    train: Sequence[Source] | Sequence[Record], evaluation: Sequence[Source] | Sequence[Record], template: Template,
    trainer_config: Any, bad_rows: str, events: EventSink, *, holdout: float = 0.0, seed: int = 0, workers: int | None = None,
    key: str | None = None, folder: Path | None = None,
) -> tuple[Data, Account]:  # fmt: skip
    """Encode both splits of some sources, or of a few records.

    key: finds the same data in the user's cache, and keeps it there. folder: an empty one for data without a key; without
    a folder the data lives as long as what is returned. Raises RequestError when nothing is left to train on.
    """
    sources = [*_sources(train, False), *_sources(evaluation, True)]
    parent = cache_folder() / "data"
    kept = parent / key if key else None
    if kept and (found := _found(kept)):
        os.utime(kept)
        data, account = opened(found)
        events.note(f"data: {len(data.train.order)} samples from the cache {kept}")  # type: ignore[union-attr]
        return data, account
    with working_folder(parent) as pending:
        target = folder or pending
        target.mkdir(exist_ok=True)
        _write(target, sources, make_encoder(sources, template, trainer_config, bad_rows), holdout, seed, workers, events)
        if kept:
            try:
                put_in_place(target, kept)
            except OSError:  # another process was faster
                if not _found(kept):
                    raise
            prune(parent, kept)
            target = kept
        return opened(Store(target))


def _sources(rows: Sequence[Source] | Sequence[Record], evaluation: bool) -> list[Source]:
    if rows and isinstance(rows[0], Record):
        return [Source("rows", rows, evaluation=evaluation)]  # type: ignore[arg-type]
    return list(rows)  # type: ignore[arg-type]


def _found(folder: Path) -> Store | None:
    """The store in a folder, if it is whole and its media are as they were."""
    try:
        store = Store(folder, check=True) if folder.is_dir() else None
    except ValueError:
        return None
    return store if store and store.media_changed() is None else None


def opened(store: Store) -> tuple[Data, Account]:
    account = store.meta["account"]
    return Data(store.view("train"), store.view("eval"), account), Account.load(account)


def _write(
    folder: Path, sources: list[Source], encoder: Encoder, holdout: float, seed: int, workers: int | None, events: EventSink
) -> None:
    """Fill the folder. Raises RequestError when nothing is left to train on."""
    held, total = _choose(sources, holdout, seed, events)
    writer, spans = Writer(folder), list[Span]()
    accounts, done = (Account(), Account()), 0
    events.emit("progress", task="tokenizing", done=0, total=total)
    try:
        with Pool(encoder, workers) as pool:
            for encoded in pool.map(_chunks(sources, held, spans)):
                add(writer, encoded, accounts)
                done += encoded.train.rows + encoded.eval.rows
                events.emit("progress", task="tokenizing", done=done, total=total)
        summary = _finish(writer, spans, held, accounts, seed, [source.evaluation for source in sources])
        writer.finish(account=summary)
    finally:
        writer.close()
        events.emit("progress", task="tokenizing", done=done, total=done, finished=True)


def _choose(sources: list[Source], holdout: float, seed: int, events: EventSink) -> tuple[bytes, int | None]:
    """Draw samples and the hold-out: flags of the rows held back, and how many rows there are, if it had to be known."""
    if holdout < 0:
        raise RequestError(f"holdout: expected a share below 1 or a count, not {holdout:g}")
    splits = bool(holdout) and not any(source.evaluation for source in sources)
    total = 0
    for source in sources:
        if splits or source.sample is not None:
            total += source.draw(seed, events.warn)
    return (hold_out(total, holdout, seed), total) if splits else (b"", None)


def _chunks(sources: Sequence[Source], held: bytes, spans: list[Span]) -> Iterator[Chunk]:
    """All rows, numbered from 0 over all sources; `spans` fills as they go."""
    start = 0
    for n, source in enumerate(sources):
        raws, first = source.raws(), start
        while part := list(islice(raws, CHUNK)):
            flags = held[start : start + len(part)] if held else (b"\1" if source.evaluation else b"\0") * len(part)
            yield Chunk(start, n, flags, part)
            start += len(part)
        if start == first:
            raise RequestError(f"{source.label} is empty: it has no rows")
        spans.append((source.weight, first, start))


def add(writer: Writer, encoded: Encoded, accounts: tuple[Account, Account], numbered: bool = False) -> None:
    """Write a chunk's samples, and the list of its rows that did not go through whole, with their numbers if asked."""
    writer.add(encoded.packed)
    for account, part, split in zip(accounts, (encoded.train, encoded.eval), ({}, {"split": "eval"}), strict=True):
        account.add(part)
        for issue in part.issues:
            shown = {key: value for key, value in issue.items() if numbered or key != "record"} | split
            writer.write("issues.jsonl", (json.dumps(shown, ensure_ascii=False) + "\n").encode())


def _finish(
    writer: Writer, spans: list[Span], held: bytes, accounts: tuple[Account, Account], seed: int, evaluation: list[bool]
) -> dict[str, Any]:
    """Write the order of an epoch and of the evaluation, where they are not simply all samples. Returns the account."""
    account, account_eval = accounts
    if held or any(evaluation) or any(weight != 1 for weight, _, _ in spans):
        row_of = writer.column("rows", "Q")
        training = [span for span, aside in zip(spans, evaluation, strict=True) if not aside]
        places, account.rows = order(row_of, training, held, seed)
        first = bisect_left(row_of, training[-1][2]) if training else 0
        aside = array("I", compress(range(first), (held[row] for row in row_of[:first])) if held else range(first, len(row_of)))
        writer.write("train", places.tobytes())
        writer.write("eval", aside.tobytes())
        account.samples = len(places)
        lengths, trained = writer.column("lengths", "I"), writer.column("trained", "I")
        account.tokens = sum(map(lengths.__getitem__, places))
        account.trained_tokens = sum(map(trained.__getitem__, places))
    if not account.trained_tokens and not all(evaluation):
        reasons = ", ".join(f"{count} {what}" for what, count in account.reasons.items()) or "the data set is empty"
        raise RequestError(f"dataset: no row is left to train on ({reasons} of {account.rows} rows)")
    return {**account.summary(), "eval": account_eval.summary()}


# --- handing over to the ranks ----------------------------------------------------------------------------------------


def hand_over(data: Data, folder: Path) -> None:
    """Write into a run's `data` folder where its samples lie, and which rows did not go through whole."""
    folder.mkdir(exist_ok=True)
    store = data.eval.store.folder  # type: ignore[attr-defined]
    windows = getattr(data.train, "folder", None)
    place = {"store": str(store), "windows": str(windows) if windows else None}
    (folder / "place.json").write_text(json.dumps(place, indent=2) + "\n", encoding="utf-8")
    if windows and (folder / "account.json").is_file():
        return  # a resumed stream goes on listing where it was
    target = folder / "issues.jsonl"
    if (store / target.name).is_file():
        shutil.copyfile(store / target.name, target)
    else:
        target.write_bytes(b"")


def receive(folder: Path) -> tuple[Data, Path | None]:
    """What `hand_over` wrote, in a rank; for a stream also the folder of its windows."""
    place = json.loads((folder / "place.json").read_text(encoding="utf-8"))
    data, _ = opened(Store(Path(place["store"])))
    return data, Path(place["windows"]) if place["windows"] else None


def fingerprint(data: Data) -> str:
    """A hash of all that is trained and evaluated on, in its order: a resumed run must have the same."""
    store = data.eval.store  # type: ignore[attr-defined]
    return f"{store.digest}{getattr(data.train, 'digest', '')}"
