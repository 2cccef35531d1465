"""Options of the data set `huggingface`, and the names of the row shapes that it can be told to expect.

The kernel fills `path` with the name that the user gave: `--dataset FILE`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from swift_core.config import option

from swift_plugin_huggingface.splits import parse_split

Format = Literal["auto", "messages", "sharegpt", "alpaca", "query", "prompt", "question", "problem", "preference", "text"]


@dataclass(frozen=True)
class HuggingFaceConfig:
    """What to read and how. Raises ValueError where the options contradict each other."""

    path: str = option("", "a data file, a folder, or a hub id OWNER/NAME; the data set's name is this")
    split: str | None = option(None, "a split or a slice of one: test, train[:500], [90%:]; default: train, else the only one")
    subset: str | None = option(None, "the configuration of a hub data set, such as `main`")
    columns: dict[str, str] = option({}, "renames your keys to the standard ones: {q: query, a: response}")
    format: Format = option("auto", "the shape of the rows, where it should not be recognised by its keys")
    system: str | None = option(None, "a system message for each row that has none")
    media_folder: str | None = option(None, "where relative paths of images, videos and audios start [the data file's folder]")

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("option 'path' must be set: a data file, a folder or a hub id")
        parse_split(self.split)
        targets = list(self.columns.values())
        for target in sorted(set(targets)):
            if targets.count(target) > 1:
                keys = ", ".join(key for key, value in self.columns.items() if value == target)
                raise ValueError(f"columns: {keys} would all become {target!r}")
        if self.system is not None and not self.system.strip():
            raise ValueError("system: expected a text; leave it out for none")
        if self.media_folder is not None and not Path(self.media_folder).expanduser().is_dir():
            raise ValueError(f"media_folder: no folder {self.media_folder!r}")
