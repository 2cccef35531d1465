"""The data set itself: raw records of a source, each mapped to the standard row or refused with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from swift_core.cache import fingerprint
from swift_core.types import Record

from swift_plugin_huggingface.config import HuggingFaceConfig
from swift_plugin_huggingface.files import Raw, parse
from swift_plugin_huggingface.media import MEDIA, locate
from swift_plugin_huggingface.messages import RowFault
from swift_plugin_huggingface.rows import Row, standard_row
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
        return standard_record(parse(raw), self.config, str(raw[1]))

    def fingerprint(self) -> str | None:
        """Of the files; a split of a library's table may be part of them, so its options count as well. None without files."""
        return fingerprint(self.rows.files) if self.rows.files else None


def open_dataset(config: HuggingFaceConfig) -> HuggingFaceDataset:
    """Raises RequestError when the source cannot be found."""
    return HuggingFaceDataset(config, open_source(config))


def standard_record(raw: Record, config: HuggingFaceConfig, file: str) -> Record:
    """`raw` with its row in the standard form, or as it was with the reason why it cannot be. `file` holds it."""
    if raw.refused:
        return raw
    try:
        row = standard_row(rename(raw.row, config.columns), config.format, config.system)
    except RowFault as err:
        return Record(raw.row, raw.where, str(err))
    return Record(find_media(row, file, config), raw.where)


def rename(row: Row, columns: dict[str, str]) -> Row:
    """The row under its standard keys. Raises RowFault where a key would land on another that stays."""
    if not columns:
        return row
    for key, target in columns.items():
        if key in row and target in row and target not in columns:
            raise RowFault(f"dataset.columns: {key!r} cannot become {target!r}: the row has that key too")
    return {columns.get(key, key): value for key, value in row.items()}


@lru_cache(maxsize=4096)
def folders_of(file: str, path: str) -> tuple[Path, ...]:
    """Where relative paths inside a data set may start: the folder of the file with the row, then that of the data set."""
    found = [Path(name).expanduser() for name in (file, path)]
    return tuple(dict.fromkeys(name if name.is_dir() else name.parent for name in found))


def find_media(row: Row, file: str, config: HuggingFaceConfig) -> Row:
    """The row with media paths that start where the files are; what is no path is left as it is."""
    held = [column for column in MEDIA.values() if column in row]
    if not held:
        return row
    folders = folders_of(file, config.path)
    forced = Path(config.media_folder).expanduser() if config.media_folder else None
    return {**row, **{column: [locate(item, folders, forced) for item in row[column]] for column in held}}
