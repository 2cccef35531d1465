"""Chunks of raw rows to packed samples: the work of one process, with no state between chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from swift_core.errors import RowError
from swift_core.source import Source, encode_record
from swift_core.types import Sample, Template

from swift_plugin_prepare.account import Account, Overflow, fitter
from swift_plugin_prepare.store import Packed, pack


class Chunk(NamedTuple):
    """Raw rows of one source; the first is number `start` of all rows. `held` flags those kept back for evaluation."""

    start: int
    source: int
    held: bytes
    raws: list[Any]


class Encoded(NamedTuple):
    packed: Packed
    train: Account
    eval: Account


@dataclass(frozen=True)
class Encoder:
    """Everything that decides what a row becomes."""

    sources: Sequence[Source]
    template: Template
    max_length: int | None
    overflow: Overflow
    skip_bad: bool

    def __call__(self, chunk: Chunk) -> Encoded:
        """Raises RowError for a row that cannot be used, unless such rows are skipped and counted."""
        accounts = (Account(), Account())
        fits = [fitter(self.max_length, self.overflow, account) for account in accounts]
        kept: list[Sample] = []
        source = self.sources[chunk.source]
        for number, (raw, held) in enumerate(zip(chunk.raws, chunk.held, strict=True), chunk.start):
            account = accounts[held]
            listed = len(account.issues)
            account.rows += 1
            try:
                for sample in encode_record(source.record(raw), self.template, number):
                    for piece in fits[held](sample):
                        kept.append(piece)
                        account.samples += 1
                        account.tokens += len(piece.input_ids)
                        account.trained_tokens += piece.trained_tokens
                        account.notes.update({*piece.notes, *(["appended"] if piece.appended else [])})
            except RowError as err:
                skipped = getattr(err.__cause__, "skip", False)  # the template's own option leaves such rows out
                if not (self.skip_bad or skipped):
                    raise RowError(err.where, f"{err.reason} (bad_rows=skip leaves such rows out, and counts them)") from None
                account.issue(err.where, getattr(err.__cause__, "what", "refused"), err.reason)
            for issue in account.issues[listed:]:
                issue["record"] = number
        return Encoded(pack(kept), *accounts)
