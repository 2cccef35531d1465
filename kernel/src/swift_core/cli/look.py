"""`swift-core inspect`, `doctor` and `config`: what would happen, and what is here."""

from __future__ import annotations

import json
import platform
from typing import Any

import click

from swift_core import __version__
from swift_core.cli.common import ARGUMENTS, DATASET, JSON, MODEL, TRUST, config_of, options, print_json, print_table
from swift_core.config import DEFAULT_MODEL, RunConfig, describe_options, dump_options
from swift_core.errors import RequestError, RowError, SwiftError
from swift_core.index import build_index
from swift_core.registry import Registry, plugin_problem


@click.command()
@options(ARGUMENTS, MODEL, DATASET, click.option("--template", metavar="T", help="A template's id, or a .jinja file."))
@options(click.option("--trainer", metavar="R", help="Whose default template to use [sft]."))
@options(click.option("--limit", type=click.IntRange(1), help="Rows shown."), TRUST, JSON)
def inspect(arguments: tuple[str, ...], template: str | None, limit: int | None, as_json: bool, **flags: Any) -> None:
    """Show what each row becomes: the rendered text, with what is trained in colour."""
    from swift_core.events import EventSink
    from swift_core.session import Session
    from swift_core.source import encode_record

    if template and template.endswith((".jinja", ".jinja2", ".j2")):
        arguments = (*arguments, f"template.file={template}")
    elif template:
        flags["template"] = template
    config = config_of(arguments, needs_data=True, **flags)
    with Session(config, EventSink()) as session:
        made = session.training_template()
        refused, records = 0, session.records(config.dataset)[:limit]
        for number, record in enumerate(records):
            try:
                samples = encode_record(record, made, number)
            except RowError as err:
                refused += 1
                _show_refused(number, err, as_json)
                continue
            for sample in samples:
                shown = {
                    "row": number, "turns": sample.turns, "text": sample.text, "trained": sample.spans,
                    "appended": sample.appended, "kwargs": sample.kwargs, "tokens": len(sample.input_ids),
                    "trained_tokens": sample.trained_tokens,
                }  # fmt: skip
                if as_json:
                    click.echo(json.dumps(shown, ensure_ascii=False, separators=(",", ":")))
                else:
                    _show_sample(shown, sample, made)
    if refused == len(records):
        raise SwiftError(f"all {refused} rows are refused")


def _show_refused(number: int, err: RowError, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"row": number, "refused": err.reason}, ensure_ascii=False, separators=(",", ":")))
    else:
        click.secho(f"row {number} ({err.where}) refused: {err.reason}\n", fg="red")


def _show_sample(shown: dict[str, Any], sample: Any, template: Any) -> None:
    notes = f", {', '.join(sample.notes)}" if sample.notes else ""
    appended = f", end marker {sample.appended!r} added" if sample.appended else ""
    kwargs = f", template arguments {sample.kwargs}" if sample.kwargs else ""
    head = f"row {shown['row']} ({sample.where}): {shown['tokens']} tokens, {shown['trained_tokens']} trained"
    click.secho(head + notes + appended + kwargs, bold=True)
    text, at = sample.text, 0
    for start, end in sample.spans:
        click.echo(text[at:start], nl=False)
        click.secho(text[start:end], fg="green", nl=False)
        at = end
    click.echo(text[at:])
    for number, (token, weight) in enumerate(zip(sample.input_ids, sample.weights, strict=True)):
        piece = f"{token}:{template.tokenizer.convert_ids_to_tokens(token)}" if hasattr(template, "tokenizer") else str(token)
        click.secho(f"{' ' if number else ''}{piece}", fg="green" if weight else None, nl=False)
    click.echo("\n")


@click.command()
@options(JSON)
def doctor(as_json: bool) -> None:
    """Show versions, devices, conflicts, and what each installed plugin lacks."""
    index = build_index()
    names = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors", "hqq", "pluggy", "click")
    report: dict[str, Any] = {
        "python": platform.python_version(), "system": platform.platform(), "swift-core": __version__,
        "libraries": {name: index.versions.get(name) for name in names},
        "plugins": {name: plugin.version for name, plugin in index.plugins.items()},
        "problems": [f"{p.name} {p.version}: {problem}" for p in index.plugins.values() if (problem := plugin_problem(p))],
        "device": _device(),
    }  # fmt: skip
    if as_json:
        print_json(report)
        return
    click.echo(f"swift-core {__version__}, Python {report['python']}, {report['system']}")
    print_table([(name, version or "not installed") for name, version in report["libraries"].items()], ("library", "version"))
    click.echo(f"device: {report['device']}")
    click.echo(f"{len(index.plugins)} plugins installed: see swift-core plugins list")
    for problem in report["problems"]:
        click.secho(f"problem: {problem}", fg="red")
    click.echo("no problem found" if not report["problems"] else f"{len(report['problems'])} problems found")


def _device() -> Any:
    """What the backend finds, or why there is none."""
    from swift_core.session import Session

    try:
        with Session(RunConfig()) as session:
            return session.backend.describe()
    except SwiftError as err:
        return str(err)


@click.group()
def config() -> None:
    """Show a resolved configuration, or its schema."""


@config.command("show")
@options(ARGUMENTS, MODEL, DATASET, JSON)
def config_show(arguments: tuple[str, ...], as_json: bool, **flags: Any) -> None:
    """Print the configuration of a run, every default filled in."""
    import yaml

    from swift_core.session import Session

    loaded = config_of(arguments, **flags)
    whole = loaded.dump()
    whole.setdefault("model", {"name": DEFAULT_MODEL})
    session = Session(loaded)
    loaded.template.name = loaded.template.name or session.trainer_template or "checkpoint"
    for kind in ("template", "tuner", "trainer", "backend", "engine", "evaluator", "quantizer"):
        component = getattr(loaded, kind)
        if component.name:
            whole[kind] = {"name": component.name, **dump_options(session.choose(kind + "s", component).options)}
    whole = json.loads(json.dumps(whole))
    if as_json:
        print_json(whole)
    else:
        click.echo(yaml.safe_dump(whole, sort_keys=False, allow_unicode=True), nl=False)


@config.command("schema")
@click.argument("address", required=False, metavar="[KIND:ID]")
def config_schema(address: str | None) -> None:
    """Print the options of the configuration, or of one component such as tuner:lora, as JSON."""
    from swift_core.activate import load_object
    from swift_core.api import KINDS

    if address is None:
        cls: Any = RunConfig
    else:
        kind, _, ident = address.partition(":")
        tables = {singular: table for table, singular in KINDS.items()}
        if kind not in tables or not ident:
            raise RequestError(f"{address!r}: expected KIND:ID, such as tuner:lora; kinds: {', '.join(tables)}")
        contribution = Registry(build_index()).find(tables[kind], ident)
        cls = load_object(contribution.entry.config, contribution) if contribution.entry.config else None
    rows = describe_options(cls)
    print_json({name: {"type": kind, "default": _plain(default), "help": text} for name, kind, default, text in rows})


def _plain(default: Any) -> Any:
    return default.dump() if hasattr(default, "dump") else default
