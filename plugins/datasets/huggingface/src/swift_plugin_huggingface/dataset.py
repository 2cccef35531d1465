"""The data set itself: raw records of a source, each mapped to the standard row or refused with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from swift_core.cache import fingerprint
from swift_core.types import Record

from swift_plugin_huggingface.config import HuggingFaceConfig
from swift_plugin_huggingface.files import Raw, parse
from swift_plugin_huggingface.messages import RowFault
from swift_plugin_huggingface.rows import MEDIA, Row, standard_row
from swift_plugin_huggingface.sources import Rows, open_source
from swift_plugin_huggingface.splits import cut, parse_split


@dataclass(frozen=True)
class HuggingFaceDataset:
    """Records in the standard form, read anew at each iteration. A slice counts refused rows too."""

    config: HuggingFaceConfig
    rows: Rows

    def __iter__(self) -> Iterator[Record]:
        return map(self.record, self.raw())

    def raw(self) -> Iterator[Raw]:
        return cut(parse_split(self.config.split), self.rows.read)

    def record(self, raw: Raw) -> Record:
        return standard_record(parse(raw), self.config)

    def fingerprint(self) -> str | None:
        """Of the files; a split of a library's table may be part of them, so its options count as well. None without files."""
        return fingerprint(self.rows.files) if self.rows.files else None


def open_dataset(config: HuggingFaceConfig) -> HuggingFaceDataset:
    """Raises RequestError when the source cannot be found."""
    return HuggingFaceDataset(config, open_source(config))


def standard_record(raw: Record, config: HuggingFaceConfig) -> Record:
    """`raw` with its row in the standard form, or as it was with the reason why it cannot be."""
    if raw.refused:
        return raw
    try:
        row = standard_row(rename(raw.row, config.columns), config.format, config.system)
    except RowFault as err:
        return Record(raw.row, raw.where, str(err))
    return Record(find_media(row, folder_of(config.path)), raw.where)


def rename(row: Row, columns: dict[str, str]) -> Row:
    """The row under its standard keys. Raises RowFault where a key would land on another that stays."""
    if not columns:
        return row
    for key, target in columns.items():
        if key in row and target in row and target not in columns:
            raise RowFault(f"dataset.columns: {key!r} cannot become {target!r}: the row has that key too")
    return {columns.get(key, key): value for key, value in row.items()}


@lru_cache(maxsize=64)
def folder_of(path: str) -> Path:
    """The folder that relative paths inside a data set start from."""
    found = Path(path).expanduser()
    return found if found.is_dir() else found.parent


def find_media(row: Row, folder: Path) -> Row:
    """The row with media paths that exist beside the data file made to start there; all else is left as it is."""

    def locate(item: Any) -> Any:
        if isinstance(item, str) and len(item) < 4096 and "://" not in item and not item.startswith("data:"):
            path = folder / item
            return str(path) if path.is_file() else item
        return item

    return {key: [locate(item) for item in value] if key in MEDIA.values() else value for key, value in row.items()}
