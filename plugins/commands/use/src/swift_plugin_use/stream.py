"""One answer printed as it comes: reasoning dim, tool calls on lines of their own."""

from __future__ import annotations

from typing import Any

import click
from swift_core.answers import message_of
from swift_core.session import Opened
from swift_core.types import AnswerDelta, Request, Row


class Shown:
    """Prints deltas, and keeps them."""

    def __init__(self) -> None:
        self.deltas: list[AnswerDelta] = []
        self.kind = ""

    def add(self, deltas: list[AnswerDelta]) -> None:
        for delta in deltas:
            kind = "call" if delta.call is not None else "reasoning" if delta.reasoning else "content"
            if delta.name or (self.kind and kind != self.kind):
                click.echo()
            self.kind = kind
            if delta.name:
                click.secho(f"-> {delta.name} ", nl=False, bold=True)
            click.secho(delta.reasoning or delta.arguments or delta.content, nl=False, dim=kind == "reasoning")
            self.deltas.append(delta)


def stream_answer(opened: Opened, request: Request) -> Row:
    """Print an answer as it comes; Ctrl-C ends it early and keeps what was said. Raises ValueError for what cannot be asked."""
    reader = _reader(opened, request)
    shown, fed, said = Shown(), 0, ""
    told: Row | None = None
    pieces = opened.engine.generate([request], stream=True)
    try:
        for piece in pieces:
            if reader is not None and piece.text and not piece.token_ids and not fed:
                reader = None  # an engine that tells texts alone
            if piece.finish is None:
                said, fed = said + piece.text, fed + len(piece.token_ids)
                shown.add(reader.feed(piece.token_ids) if reader else [AnswerDelta(piece.text)])
            else:
                told = piece.message
                if reader:
                    shown.add(reader.feed(piece.token_ids[fed:]))
                elif piece.text.startswith(said):
                    shown.add([AnswerDelta(piece.text[len(said) :])])
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined]
    if reader:
        shown.add(reader.close())
    message = message_of(shown.deltas)
    if told and (told.get("tool_calls") or told.get("reasoning_content")):
        calls = told.get("tool_calls") or []
        shown.add([
            AnswerDelta(call=number, name=call["function"]["name"], arguments=str(call["function"].get("arguments", "")))
            for number, call in enumerate(calls)
        ])  # fmt: skip
        message = {"role": "assistant", **told}
    click.echo()
    return message


def _reader(opened: Opened, request: Request) -> Any:
    """What tells the answer's parts apart; None where the template has none, or where a text may cut the answer."""
    template: Any = opened.template
    if not hasattr(template, "reader") or request.stop:
        return None
    prompt = template.prompt(request.messages, request.tools, **request.template_kwargs)
    return template.reader(prompt, request.tools)
