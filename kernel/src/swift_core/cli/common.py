"""Options that several commands share, and how a command line becomes a RunConfig."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from swift_core.config import RunConfig, load_config
from swift_core.errors import RequestError

F = TypeVar("F", bound=Callable[..., Any])

ARGUMENTS = click.argument("arguments", nargs=-1, metavar="[CONFIG.yaml]... [KEY=VALUE]...")
MODEL = click.option("--model", metavar="M", help="A model id, folder, run folder or hub id.")
DATASET = click.option("--dataset", multiple=True, metavar="D", help="A file, folder or id; path#500 takes 500 rows.")
TRUST = click.option("--trust-remote-code", is_flag=True, default=None, help="Let the checkpoint's own code run.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace what an earlier call wrote to the output.")


def options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several click decorators as one, in the order written."""

    def apply(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


def config_of(arguments: tuple[str, ...], needs_data: bool = False, **flags: Any) -> RunConfig:
    """Files first, then flags, then KEY=VALUE. Raises RequestError where a command needs a data set and has none."""
    files = [Path(text) for text in arguments if "=" not in text]
    config = load_config(files, [text for text in arguments if "=" in text], flags)
    if needs_data and not config.dataset:
        raise RequestError("dataset is missing: --dataset FILE")
    return config


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def print_fields(fields: dict[str, Any], as_json: bool) -> None:
    """As JSON, or a line for each field; a list as its items."""
    if as_json:
        print_json(fields)
    else:
        texts = {key: ", ".join(value) if isinstance(value, list) else str(value) for key, value in fields.items()}
        print_table(list(texts.items()), ("field", "value"))


def print_table(rows: list[tuple[str, ...]], header: tuple[str, ...]) -> None:
    """Columns as wide as their widest cell; the last one as it is."""
    widths = [max(len(row[n]) for row in [header, *rows]) for n in range(len(header))]
    for row in [header, *rows]:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
