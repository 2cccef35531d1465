"""`swift-core export` and `quantize`: a model folder made from another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from swift_core.cli.common import ARGUMENTS, JSON, MODEL, OVERWRITE, TRUST, config_of, options, print_json
from swift_core.events import console_events

from swift_plugin_use import folders

OUTPUT = click.option("--output", required=True, metavar="DIR", help="The folder to write.")


@click.command()
@options(ARGUMENTS, MODEL, OUTPUT, OVERWRITE, TRUST, JSON)
def export(arguments: tuple[str, ...], output: str, overwrite: bool, as_json: bool, **flags: Any) -> None:
    """Merge a run's or an adapter's weights into its model, load the result again, and print the log-probability gap."""
    _show(folders.export(config_of(arguments, **flags), Path(output), overwrite, console_events()), as_json)


@click.command()
@options(ARGUMENTS, MODEL, click.option("--quantizer", metavar="Q", help="How to quantize: see swift-core quantizers list."))
@options(OUTPUT, OVERWRITE, TRUST, JSON)
def quantize(arguments: tuple[str, ...], output: str, overwrite: bool, as_json: bool, **flags: Any) -> None:
    """Quantize a model folder into a folder, load it again, and print the log-probability gap."""
    _show(folders.quantize(config_of(arguments, **flags), Path(output), overwrite, console_events()), as_json)


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(result)
    else:
        click.echo(f"written: {result['output']}")
