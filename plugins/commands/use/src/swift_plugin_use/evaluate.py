"""`swift-core eval`: an evaluator's figures on a data set whose rows hold the right answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from swift_core.cli.common import ARGUMENTS, DATASET, JSON, MODEL, TRUST, config_of, options, print_json, print_table
from swift_core.events import console_events
from swift_core.plan import write_json
from swift_core.session import Session
from swift_core.types import EvalRun, Evaluator

from swift_plugin_use.options import ADAPTER, ENGINE


@click.command("eval")
@options(ARGUMENTS, MODEL, ADAPTER, DATASET, click.option("--evaluator", metavar="E", help="What scores [exact]."))
@options(click.option("--output", metavar="FILE", help="Write the report with every row as JSON."), ENGINE, TRUST, JSON)
def evaluate(arguments: tuple[str, ...], adapter: str | None, output: str | None, as_json: bool, **flags: Any) -> None:
    """Score a model on a data set whose rows hold the right answers."""
    config = config_of(arguments, needs_data=True, **flags)
    with Session(config, console_events()) as session:
        evaluator = session.call(session.choose("evaluators", config.evaluator), "swift_make_evaluator", Evaluator)
        records = session.records(config.dataset)
        opened = session.opened(adapter)
        template: Any = opened.template  # None for a model at an address
        report = evaluator.evaluate(EvalRun(opened.engine, records, template, session.events, session.part))
        whole = {
            "model": opened.ref.describe() if opened.ref else opened.name,
            "metrics": report.metrics,
            "counts": report.counts,
        }
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(output), {**whole, "rows": report.rows})
    if as_json:
        print_json(whole)
    else:
        print_table([(name, f"{value:.4f}") for name, value in report.metrics.items()], ("metric", "value"))
        click.echo(", ".join(f"{count} {what}" for what, count in report.counts.items()))
