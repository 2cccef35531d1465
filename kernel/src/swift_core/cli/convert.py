"""`swift-core export` and `quantize`: a model folder made from another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from swift_core.cli.common import ARGUMENTS, JSON, MODEL, OVERWRITE, TRUST, config_of, options, print_json
from swift_core.events import EventSink, make_console

OUTPUT = click.option("--output", required=True, metavar="DIR", help="The folder to write.")


@click.command()
@options(ARGUMENTS, MODEL, OUTPUT, OVERWRITE, TRUST, JSON)
def export(arguments: tuple[str, ...], output: str, overwrite: bool, as_json: bool, **flags: Any) -> None:
    """Merge a run's or an adapter's weights into its model, load the result again, and print the log-probability gap."""
    from swift_core.exporting import export as run_export

    _show(run_export(config_of(arguments, **flags), Path(output), overwrite, _events()), as_json)


@click.command()
@options(ARGUMENTS, MODEL, click.option("--quantizer", metavar="Q", help="How to quantize: see swift-core quantizers list."))
@options(OUTPUT, OVERWRITE, TRUST, JSON)
def quantize(arguments: tuple[str, ...], output: str, overwrite: bool, as_json: bool, **flags: Any) -> None:
    """Quantize a model folder into a folder, load it again, and print the log-probability gap."""
    from swift_core.exporting import quantize as run_quantize

    _show(run_quantize(config_of(arguments, **flags), Path(output), overwrite, _events()), as_json)


def _events() -> EventSink:
    events = EventSink()
    events.add(make_console())
    return events


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(result)
    else:
        click.echo(f"written: {result['output']}")
