"""`swift-core chat`: a conversation, answers appearing as they are made."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
from swift_core.cli.common import ARGUMENTS, MODEL, TRUST, config_of, options
from swift_core.errors import RequestError
from swift_core.events import console_events
from swift_core.session import Session
from swift_core.types import Request, Row

from swift_plugin_use.options import ADAPTER, ENGINE, SAMPLING, model_with, take_request

CHAT_HELP = (
    "/system TEXT sets the system message, /clear forgets, /save FILE writes the talk, /exit ends.\n"
    "/image FILE, /video FILE and /audio FILE show a file with the next message.\n"
    'A \\ at a line\'s end, or """ before and after, makes several lines one message.'
)


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


@click.command()
@options(ARGUMENTS, MODEL, ADAPTER, click.option("--system", help="A system message."), SAMPLING, ENGINE, TRUST)
def chat(arguments: tuple[str, ...], adapter: str | None, system: str | None, **flags: Any) -> None:
    """Talk to a model, answers appearing as they are made."""
    request = take_request(flags)
    with Session(config_of(arguments, **flags), console_events()) as session:
        ref = model_with(session, adapter)
        engine = session.engine(ref)
        if "predict" in engine.capabilities:
            raise RequestError(f"model {ref.name} does not generate text: it has a head; use swift-core infer")
        talk = Talk([{"role": "system", "content": system}] if system else [])
        takes_media = "media" in engine.capabilities
        if sys.stdin.isatty():
            click.echo(CHAT_HELP)
        while True:
            try:
                text = _read_message()
            except EOFError:
                return
            if text.startswith("/") and "\n" not in text:
                if text in ("/exit", "/quit"):
                    return
                talk = _command(text, talk, takes_media)
            elif text.strip():
                asked = talk.asked(text)
                try:
                    answer = _stream(engine, replace(request, messages=asked.messages, media=asked.media))
                except ValueError as err:  # a file that cannot be read, or that the model does not take
                    click.echo(f"(not asked: {err})")
                    talk = replace(talk, waiting=())
                    continue
                talk = replace(asked, messages=[*asked.messages, {"role": "assistant", "content": answer}])


def _read_message() -> str:
    prompt = "> " if sys.stdin.isatty() else ""
    line = input(prompt)
    if line.strip().startswith('"""'):
        lines = [line.strip()[3:]]
        while not lines[-1].rstrip().endswith('"""'):
            lines.append(input(". " if prompt else ""))
        lines[-1] = lines[-1].rstrip()[:-3]
        return "\n".join(lines).strip("\n")
    while line.endswith("\\"):
        line = line[:-1] + "\n" + input(". " if prompt else "")
    return line


def _command(text: str, talk: Talk, takes_media: bool) -> Talk:
    name, _, argument = text.partition(" ")
    if name in MEDIA and argument:
        return _show(MEDIA[name], str(Path(argument.strip()).expanduser()), talk, takes_media)
    if name == "/clear":
        click.echo("(forgotten)")
        return Talk([message for message in talk.messages if message["role"] == "system"])
    if name == "/system":
        click.echo("(system message set; the talk begins anew)" if argument else "(no system message; the talk begins anew)")
        return Talk([{"role": "system", "content": argument}] if argument else [])
    if name == "/save" and argument:
        try:
            with Path(argument).expanduser().open("a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": talk.messages, **talk.media}, ensure_ascii=False) + "\n")
            click.echo(f"(added to {argument})")
        except OSError as err:
            click.echo(f"(not saved: {argument}: {err.strerror})")
        return talk
    click.echo(f"(no command {name}) {CHAT_HELP}")
    return talk


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


def _stream(engine: Any, request: Request) -> str:
    """Print an answer as it comes; Ctrl-C ends it early and keeps what was said."""
    said = ""
    pieces = engine.generate([request], stream=True)
    try:
        for piece in pieces:
            if piece.finish is None:
                said += piece.text
                click.echo(piece.text, nl=False)
            elif piece.text.startswith(said):
                click.echo(piece.text[len(said) :], nl=False)
                said = piece.text
    except KeyboardInterrupt:
        pieces.close()
    click.echo()
    return said
