"""A source too long to prepare whole: windows of some thousand rows, each a store of its own, the next one made in advance.

A window is a pure function of its position and the settings, whatever the number of workers or ranks. The ranks of a machine
share a folder of windows: under a lock, whoever comes first makes one. To skip to a position, rows are read, not encoded.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from swift_core.errors import RequestError
from swift_core.plan import write_json
from swift_core.rundir import put_in_place
from swift_core.source import Source

from swift_plugin_prepare.account import Account
from swift_plugin_prepare.encode import Chunk, Encoder
from swift_plugin_prepare.folders import working_folder
from swift_plugin_prepare.prepare import CHUNK, add
from swift_plugin_prepare.rows import one_source
from swift_plugin_prepare.store import Store, View, Writer
from swift_plugin_prepare.workers import Pool, Worker


class Preparer:
    """Makes windows, in a process of its own. Reading goes on where the last window ended."""

    def __init__(self, folder: Path, encoder: Encoder, size: int, pool: Pool) -> None:
        self.folder, self.encoder, self.size, self.pool = folder, encoder, size, pool
        self.at, self.rows = 0, encoder.sources[0].raws()

    def __call__(self, position: int) -> None:
        """Make the window, unless it is there or another process makes it meanwhile."""
        target = self.folder / str(position)
        with _lock(self.folder / f".{position}.lock"):
            if not target.is_dir():
                with working_folder(self.folder) as pending:
                    self._make(pending, position)
                    put_in_place(pending, target)

    def _make(self, folder: Path, position: int) -> None:
        if position != self.at:
            self.at, self.rows = position, islice(self.encoder.sources[0].raws(), position, None)
        writer, accounts, count = Writer(folder), (Account(), Account()), 0
        start = self.encoder.sources[0].first + position

        def chunks() -> Iterator[Chunk]:
            nonlocal count
            while part := list(islice(self.rows, min(CHUNK, self.size - count))):
                yield Chunk(start + count, 0, bytes(len(part)), part)
                count += len(part)

        try:
            for encoded in self.pool.map(chunks()):
                add(writer, encoded, accounts, numbered=True)
        finally:
            writer.close()
        following = list(islice(self.rows, 1))
        self.at, self.rows = position + count, chain(following, self.rows)
        end = start + count if count else start
        writer.finish(account=accounts[0].summary(), next=self.at if following else 0, end=end)


class WindowStream:
    """`Stream` of one source. `follow` has what becomes of its rows listed in a run's folder."""

    def __init__(self, folder: Path, encoder: Encoder, size: int, workers: int | None) -> None:
        if not hasattr(os, "fork"):
            raise RequestError("stream: this system cannot fork, which a stream's background process needs")
        self.folder, self.account = folder, Account()
        self._high = 0  # rows up to here are counted and listed
        folder.mkdir(exist_ok=True)
        self._worker = Worker(Preparer(folder, encoder, size, Pool(encoder, workers or 0)))
        self._asked, self._opened = list[int](), list[int]()
        self._listing: Path | None = None

    def window(self, position: int) -> tuple[View, int]:
        """Raises RowError for a row that cannot be used, RequestError where the source has nothing to train on."""
        store = None
        while store is None:
            if position not in self._asked:
                self._ask(position)
            while position in self._asked:
                self._worker.receive()
                self._asked.pop(0)
            with suppress(ValueError):  # a rank that is ahead may have removed it
                store = Store(self.folder / str(position))
        following: int = store.meta["next"]
        self._count(store)
        if not len(store) and not position and not following:
            raise RequestError(f"dataset: no row is left to train on (of {self.account.rows} rows)")
        self._forget(position, following)
        if following != position and following not in self._asked:
            self._ask(following)
        return store.view("train"), following

    @property
    def digest(self) -> str:
        """A hash of the first window: another source, or other settings, would have another."""
        store: Store = self.window(0)[0].store
        return store.digest

    def follow(self, folder: Path) -> None:
        """Go on counting in `account.json` and listing in `issues.jsonl` of a run's `data` folder. No row twice."""
        self._listing, counts, issues = folder, folder / "account.json", folder / "issues.jsonl"
        self.account, self._high = Account(), 0
        if counts.is_file():
            summary = json.loads(counts.read_text(encoding="utf-8"))
            self.account, self._high = Account.load(summary), summary["rows_to"]
        lines = issues.read_bytes().splitlines(keepends=True) if issues.is_file() else []
        kept = [line for line in lines if json.loads(line).get("split") or json.loads(line)["record"] < self._high]
        issues.write_bytes(b"".join(kept))  # a kill may have come between the list and the counts

    def close(self) -> None:
        self._worker.stop()

    def _ask(self, position: int) -> None:
        self._worker.send(position)
        self._asked.append(position)

    def _count(self, store: Store) -> None:
        if self._listing is None or store.meta["end"] <= self._high:
            return
        file = store.folder / "issues.jsonl"
        if file.is_file():
            with (self._listing / file.name).open("ab") as listed:
                listed.write(file.read_bytes())
        self._high = store.meta["end"]
        self.account.add(Account.load(store.meta["account"]))
        write_json(self._listing / "account.json", {**self.account.summary(), "rows_to": self._high})

    def _forget(self, position: int, following: int) -> None:
        """Keep the last three windows: another rank may be one behind. What is mapped stays readable."""
        self._opened = [*(seen for seen in self._opened if seen != position), position]
        for old in self._opened[:-3]:
            if old != following:
                shutil.rmtree(self.folder / str(old), ignore_errors=True)
        self._opened = self._opened[-3:]


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time; the system frees it when its holder dies."""
    import fcntl  # not on Windows, which cannot fork either

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # to close is not enough: a worker forked meanwhile has the file open too


def split_stream(train: list[Source], held: list[Any], holdout: float, trainer_config: Any) -> tuple[Source, list[Any]]:
    """The source of a stream, and what it is evaluated on: sources given for that, else its first `holdout` rows.

    Raises RequestError where an option needs to know how long the stream is.
    """
    if getattr(trainer_config, "max_steps", 1) is None:
        raise RequestError("stream: how long it is, is not known beforehand; set trainer.max_steps")
    for source in train:
        if source.sample is not None:
            raise RequestError(
                f"stream: {source.label} cannot be sampled at random; take the first rows with dataset.split=[:N]"
            )
    stream = one_source(train)
    if held or not holdout:
        return stream, held
    if holdout < 1:
        raise RequestError(f"holdout: of a stream the first rows are kept back; expected a count, not {holdout:g}")
    count = int(holdout)
    return replace(stream, first=count), [replace(stream, stop=count, evaluation=True)]
