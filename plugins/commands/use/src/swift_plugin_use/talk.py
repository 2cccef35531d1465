"""A conversation as it stands, and its own commands: /system, /clear, /save, and files that are shown."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
from swift_core.types import Row

MEDIA = {"/image": "images", "/video": "videos", "/audio": "audios"}


@dataclass(frozen=True)
class Talk:
    """What was said, the files that its media parts show, and those that wait for the next message: (column, file)."""

    messages: list[Row]
    media: dict[str, list[Any]] = field(default_factory=dict)
    waiting: tuple[tuple[str, str], ...] = ()

    def asked(self, text: str) -> Talk:
        """The talk with one more question, which shows the files that waited."""
        if not self.waiting:
            return replace(self, messages=[*self.messages, {"role": "user", "content": text}])
        parts = [{"type": column[:-1]} for column, _ in self.waiting]
        media = {column: list(files) for column, files in self.media.items()}
        for column, file in self.waiting:
            media.setdefault(column, []).append(file)
        return Talk([*self.messages, {"role": "user", "content": [*parts, {"type": "text", "text": text}]}], media)

    def said(self, *messages: Row) -> Talk:
        return replace(self, messages=[*self.messages, *messages])


def begin_talk(system: str | None) -> Talk:
    return Talk([{"role": "system", "content": system}] if system else [])


def talk_command(name: str, argument: str, talk: Talk, takes_media: bool, tools: list[Any]) -> Talk | None:
    """The talk after a command of its own; None for another."""
    if name in MEDIA and argument:
        return _show(MEDIA[name], str(Path(argument.strip()).expanduser()), talk, takes_media)
    if name == "/clear":
        click.echo("(forgotten)")
        return Talk([message for message in talk.messages if message["role"] == "system"])
    if name == "/system":
        click.echo("(system message set; the talk begins anew)" if argument else "(no system message; the talk begins anew)")
        return begin_talk(argument)
    if name == "/save" and argument:
        row = {"messages": talk.messages, **talk.media} | ({"tools": tools} if tools else {})
        try:
            with Path(argument).expanduser().open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            click.echo(f"(added to {argument})")
        except OSError as err:
            click.echo(f"(not saved: {argument}: {err.strerror})")
        return talk
    return None


def _show(column: str, file: str, talk: Talk, takes_media: bool) -> Talk:
    """The talk with a file that waits for the next message."""
    if not takes_media:
        click.echo("(not shown: this model takes text only)")
    elif not Path(file).is_file():
        click.echo(f"(not shown: no file {file})")
    else:
        click.echo(f"({file} goes with the next message)")
        return replace(talk, waiting=(*talk.waiting, (column, file)))
    return talk
