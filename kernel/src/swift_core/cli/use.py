"""`swift-core infer`, `chat` and `eval`: a model at work, through any engine."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from swift_core.cli.common import ARGUMENTS, DATASET, ENGINE, JSON, MODEL, TRUST, config_of, options, print_json, print_table
from swift_core.config import Component
from swift_core.errors import RequestError
from swift_core.events import EventSink, make_console
from swift_core.models import ModelRef, resolve_model
from swift_core.plan import write_json
from swift_core.session import Session
from swift_core.types import EvalRun, Request, Row

ADAPTER = click.option("--adapter", metavar="DIR", help="An adapter's folder to load on top of the model.")
NUCLEUS = click.FloatRange(0, 1, min_open=True)
SAMPLING = options(
    click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True, help="New tokens at most."),
    click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0: the likeliest token."),
    click.option("--top-p", type=NUCLEUS, default=1.0, show_default=True, help="Sample from the likeliest, up to this share."),
    click.option("--top-k", type=click.IntRange(0), default=0, show_default=True, help="Sample from the K likeliest; 0: all."),
    click.option("--stop", multiple=True, help="A text that ends an answer."),
)


def _events() -> EventSink:
    events = EventSink()
    events.add(make_console())
    return events


def _model(session: Session, adapter: str | None) -> ModelRef:
    ref = session.model_ref
    if adapter is None:
        return ref
    found = resolve_model(session.registry, Component(adapter))
    if found.adapter is None:
        raise RequestError(f"adapter {adapter}: no adapter is in this folder")
    return replace(ref, adapter=found.adapter, plan=found.plan, adapter_type=found.adapter_type)


@click.command()
@options(ARGUMENTS, MODEL, ADAPTER, DATASET, click.option("--output", required=True, metavar="FILE", help="Answers, as jsonl."))
@options(SAMPLING, ENGINE, TRUST, JSON)
def infer(
    arguments: tuple[str, ...], adapter: str | None, output: str, as_json: bool,
    max_tokens: int, temperature: float, top_p: float, top_k: int, stop: tuple[str, ...], **flags: Any,
) -> None:  # fmt: skip
    """Answer every row of a data set into a jsonl file, in order. The same call again goes on after a kill."""
    from swift_core.inference import answer_file

    request = Request(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, stop=list(stop))
    config = config_of(arguments, **flags)
    if not config.dataset:
        raise RequestError("dataset is missing: --dataset FILE")
    with Session(config, _events()) as session:
        records = session.records(config.dataset)
        ref = _model(session, adapter)
        job = {"config": config.dump(), "model": ref.describe(), "request": asdict(request), "rows": [r.row for r in records]}
        engine = session.engine(ref)
        counts = answer_file(engine, records, replace(request, seed=config.seed), Path(output), job, session.events)
    if as_json:
        print_json({"output": output, **counts})
    else:
        failed = f', {counts["failed"]} failed (see their "error")' if counts["failed"] else ""
        click.echo(f"{counts['answered']} rows answered{failed}: {output}")


CHAT_HELP = (
    "/system TEXT sets the system message, /clear forgets, /save FILE writes the talk, /exit ends.\n"
    'A \\ at a line\'s end, or """ before and after, makes several lines one message.'
)


@click.command()
@options(ARGUMENTS, MODEL, ADAPTER, click.option("--system", help="A system message."), SAMPLING, ENGINE, TRUST)
def chat(
    arguments: tuple[str, ...], adapter: str | None, system: str | None,
    max_tokens: int, temperature: float, top_p: float, top_k: int, stop: tuple[str, ...], **flags: Any,
) -> None:  # fmt: skip
    """Talk to a model, answers appearing as they are made."""
    request = Request(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, stop=list(stop))
    config = config_of(arguments, **flags)
    with Session(config, _events()) as session:
        ref = _model(session, adapter)
        engine = session.engine(ref)
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


@click.command("eval")
@options(ARGUMENTS, MODEL, ADAPTER, DATASET, click.option("--evaluator", metavar="E", help="What scores [exact]."))
@options(click.option("--output", metavar="FILE", help="Write the report with every row as JSON."), ENGINE, TRUST, JSON)
def evaluate(arguments: tuple[str, ...], adapter: str | None, output: str | None, as_json: bool, **flags: Any) -> None:
    """Score a model on a data set whose rows hold the right answers."""
    config = config_of(arguments, **flags)
    if not config.dataset:
        raise RequestError("dataset is missing: --dataset FILE")
    with Session(config, _events()) as session:
        evaluator = session.evaluator()
        records = session.records(config.dataset)
        ref = _model(session, adapter)
        template = session.template(ref, session.processor(ref))
        report = evaluator.evaluate(EvalRun(session.engine(ref), records, template, session.events, session.part))
        whole = {"model": ref.describe(), "metrics": report.metrics, "counts": report.counts}
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(output), {**whole, "rows": report.rows})
    if as_json:
        print_json(whole)
    else:
        print_table([(name, f"{value:.4f}") for name, value in report.metrics.items()], ("metric", "value"))
        click.echo(", ".join(f"{count} {what}" for what, count in report.counts.items()))
