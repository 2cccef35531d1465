"""`swift-core chat`: a conversation, answers appearing as they are made."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from swift_core.cli.common import ARGUMENTS, MODEL, TRUST, config_of, options
from swift_core.events import console_events
from swift_core.session import Session
from swift_core.types import Request, Row

from swift_plugin_use.options import ADAPTER, ENGINE, SAMPLING, model_with, take_request

CHAT_HELP = (
    "/system TEXT sets the system message, /clear forgets, /save FILE writes the talk, /exit ends.\n"
    'A \\ at a line\'s end, or """ before and after, makes several lines one message.'
)


@click.command()
@options(ARGUMENTS, MODEL, ADAPTER, click.option("--system", help="A system message."), SAMPLING, ENGINE, TRUST)
def chat(arguments: tuple[str, ...], adapter: str | None, system: str | None, **flags: Any) -> None:
    """Talk to a model, answers appearing as they are made."""
    request = take_request(flags)
    with Session(config_of(arguments, **flags), console_events()) as session:
        engine = session.engine(model_with(session, adapter))
        messages: list[Row] = [{"role": "system", "content": system}] if system else []
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
                messages = _command(text, messages)
            elif text.strip():
                messages = [*messages, {"role": "user", "content": text}]
                answer = _stream(engine, replace(request, messages=messages))
                messages.append({"role": "assistant", "content": answer})


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


def _command(text: str, messages: list[Row]) -> list[Row]:
    name, _, argument = text.partition(" ")
    if name == "/clear":
        click.echo("(forgotten)")
        return [message for message in messages if message["role"] == "system"]
    if name == "/system":
        click.echo("(system message set; the talk begins anew)" if argument else "(no system message; the talk begins anew)")
        return [{"role": "system", "content": argument}] if argument else []
    if name == "/save" and argument:
        try:
            with Path(argument).expanduser().open("a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
            click.echo(f"(added to {argument})")
        except OSError as err:
            click.echo(f"(not saved: {argument}: {err.strerror})")
        return messages
    click.echo(f"(no command {name}) {CHAT_HELP}")
    return messages


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
