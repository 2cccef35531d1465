"""Reads the packaged rows and puts the names in.

`train.jsonl` and `eval.jsonl` hold standard rows with the placeholders {assistant} and {author}, and a column `kind`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files

from swift_core.types import Record, Row

from swift_plugin_identity.config import IdentityConfig


@dataclass(frozen=True)
class IdentityDataset:
    """The rows of a split, in the order of their file."""

    config: IdentityConfig

    def __iter__(self) -> Iterator[Record]:
        kept = self.config.split
        name = "train.jsonl" if kept == "train" else "eval.jsonl"
        text = (files("swift_plugin_identity") / name).read_text(encoding="utf-8")
        for number, line in enumerate(text.splitlines(), 1):
            row = json.loads(line)
            if kept in ("train", "eval", row["kind"]):
                yield Record(named(row, self.config), f"identity/{name}:{number}")


def named(row: Row, config: IdentityConfig) -> Row:
    """The row with the names in place of the placeholders. Plain replacement: answers with code hold braces too."""
    messages = [
        {**message, "content": _fill(message["content"], config)} if message["role"] == "assistant" else message
        for message in row["messages"]
    ]
    return {**row, "messages": messages}


def _fill(text: str, config: IdentityConfig) -> str:
    # one name may hold the other's placeholder, so the text is split at one before the other is filled in
    return config.assistant.join(part.replace("{author}", config.author) for part in text.split("{assistant}"))
