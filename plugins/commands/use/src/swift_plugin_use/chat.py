"""`swift-core chat`: a conversation, answers appearing as they are made, with tools, files, and one model after another."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from swift_core.cli.common import ARGUMENTS, MODEL, TRUST, config_of, options
from swift_core.config import Component, RunConfig
from swift_core.errors import RequestError, SwiftError
from swift_core.events import console_events
from swift_core.models import resolve_model
from swift_core.session import Opened, Session
from swift_core.types import Request

from swift_plugin_use.options import ADAPTER, ENGINE, SAMPLING, take_request
from swift_plugin_use.setting import with_setting
from swift_plugin_use.stream import stream_answer
from swift_plugin_use.talk import Talk, begin_talk, talk_command
from swift_plugin_use.tools import Tools, read_tools

CHAT_HELP = (
    "/system TEXT sets the system message, /clear forgets, /save FILE writes the talk, /exit ends.\n"
    "/image FILE, /video FILE and /audio FILE show a file with the next message.\n"
    "/model NAME goes on with another model or adapter, /set temperature=0.7 changes how answers are sampled.\n"
    'A \\ at a line\'s end, or """ before and after, makes several lines one message. Ctrl-C ends an answer early.'
)
ROUNDS = 16  # of calls and results before the user is asked again


@click.command()
@options(ARGUMENTS, MODEL, ADAPTER, click.option("--system", help="A system message."))
@options(click.option("--tools", metavar="FILE", help="Tools: functions of a .py file, or JSON."))
@options(click.option("--auto-tools", is_flag=True, help="Run called functions without asking."), SAMPLING, ENGINE, TRUST)
def chat(
    arguments: tuple[str, ...], adapter: str | None, system: str | None, tools: str | None, auto_tools: bool, **flags: Any
) -> None:
    """Talk to a model, answers appearing as they are made."""
    request = take_request(flags)
    known = read_tools(tools, auto_tools)
    config = config_of(arguments, **flags)
    if request.temperature and flags.get("seed") is not None:
        request = replace(request, seed=config.seed)
    desk = Desk(config, replace(request, tools=known.listed or None), known)
    try:
        desk.open(config, adapter)
        if sys.stdin.isatty():
            click.echo(CHAT_HELP)
        desk.run(begin_talk(system))
    finally:
        desk.close()


class Desk:
    """The model that is talked to, and how it is asked."""

    def __init__(self, config: RunConfig, request: Request, tools: Tools) -> None:
        self.config, self.request, self.tools = config, request, tools
        self.session: Session | None = None
        self.opened: Opened
        self.beneath: str | None = None  # the adapter that the model was opened with
        self.adapters: set[str] = set()  # folders of others, loaded on top of the model

    def open(self, config: RunConfig, adapter: str | None = None) -> None:
        """Raises RequestError for a model that cannot talk."""
        session = Session(config, console_events())
        try:
            opened = session.opened(adapter)
            if "predict" in opened.engine.capabilities:
                raise RequestError(f"model {opened.name} does not generate text: it has a head; use swift-core infer")
        except BaseException:
            session.__exit__()
            raise
        self.session, self.opened, self.config, self.beneath, self.adapters = session, opened, config, adapter, set()
        self.request = replace(self.request, adapter=None)

    @property
    def name(self) -> str:
        """Who is talked to."""
        return self.request.adapter or self.opened.name

    def close(self) -> None:
        if self.session is not None:
            self.session.__exit__()
            self.session = None

    def run(self, talk: Talk) -> None:
        """Until /exit, or the end of the input."""
        while True:
            try:
                text = _read_message()
            except EOFError:
                return
            if text.startswith("/") and "\n" not in text:
                if text in ("/exit", "/quit"):
                    return
                talk = self.command(text, talk)
            elif text.strip():
                talk = self.answer(talk, text)

    def command(self, text: str, talk: Talk) -> Talk:
        name, _, argument = text.partition(" ")
        if name == "/help":
            click.echo(CHAT_HELP)
            return talk
        if name == "/model" and argument.strip():
            self.switch(argument.strip())
            return talk
        if name == "/set" and argument:
            try:
                self.request, shown = with_setting(self.request, argument)
                click.echo(f"({shown})")
            except ValueError as err:
                click.echo(f"(not set: {err})")
            return talk
        changed = talk_command(name, argument, talk, "media" in self.opened.engine.capabilities, self.tools.listed)
        if changed is None:
            click.echo(f"(no command {name}) {CHAT_HELP}")
            return talk
        return changed

    def answer(self, talk: Talk, text: str) -> Talk:
        """The talk with a question and its answer, the calls on the way to it and their results."""
        asked = talk.asked(text)
        for _ in range(ROUNDS):
            try:
                message = stream_answer(self.opened, replace(self.request, messages=asked.messages, media=asked.media))
            except (ValueError, RequestError) as err:  # a file that cannot be read, an option that the engine lacks
                click.echo(f"(not asked: {err})")
                return replace(talk, waiting=())
            asked = asked.said(message)
            calls = message.get("tool_calls") or []
            if not calls:
                break
            asked = asked.said(*(self.tools.result(call) for call in calls))
        return asked

    def switch(self, name: str) -> None:
        """Go on with another model: an adapter of this one where the engine takes adapters, else all is loaded anew."""
        assert self.session is not None
        try:
            if self._adapter(name):
                click.echo(f"(talking to {name})")
                return
            config, before = replace(self.config, model=Component(name)), (self.config, self.beneath, self.request.adapter)
            self.close()
            try:
                self.open(config)
            except SwiftError:
                self.open(*before[:2])
                if before[2] is not None:
                    self._use(Path(before[2]))
                raise
            click.echo(f"(talking to {self.name})")
        except SwiftError as err:
            click.echo(f"(still talking to {self.name}: {err})")

    def _adapter(self, name: str) -> bool:
        """Whether the name was an adapter of the model that is loaded, or that model itself: then it is used from now on."""
        session, ref, engine = self.session, self.opened.ref, self.opened.engine
        if ref is None or ref.adapter or session is None:
            return False
        found = resolve_model(session.registry, Component(name))
        if found.source != ref.source:
            return False
        if found.adapter is None:
            self.request = replace(self.request, adapter=None)
            return True
        if "adapters" not in engine.capabilities:
            return False
        self._use(found.adapter)
        return True

    def _use(self, adapter: Path) -> None:
        """Ask an adapter from now on."""
        if str(adapter) not in self.adapters:
            self.opened.engine.load_adapter(str(adapter), adapter)
            self.adapters.add(str(adapter))
        self.request = replace(self.request, adapter=str(adapter))


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
