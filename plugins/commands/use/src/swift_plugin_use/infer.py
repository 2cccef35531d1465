"""`swift-core infer`: every row of a data set answered into a jsonl file."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
from swift_core.cli.common import ARGUMENTS, DATASET, JSON, MODEL, TRUST, config_of, options, print_json
from swift_core.events import console_events
from swift_core.session import Session
from swift_core.source import grounded

from swift_plugin_use.answers import answer_file
from swift_plugin_use.options import ADAPTER, ENGINE, SAMPLING, model_with, take_request


@click.command()
@options(ARGUMENTS, MODEL, ADAPTER, DATASET, click.option("--output", required=True, metavar="FILE", help="Answers, as jsonl."))
@options(SAMPLING, ENGINE, TRUST, JSON)
def infer(arguments: tuple[str, ...], adapter: str | None, output: str, as_json: bool, **flags: Any) -> None:
    """Answer every row of a data set into a jsonl file, in order. The same call again goes on after a kill."""
    request = take_request(flags)
    config = config_of(arguments, needs_data=True, **flags)
    with Session(config, console_events()) as session:
        records = session.records(config.dataset)
        ref = model_with(session, adapter)
        job = {"config": config.dump(), "model": ref.describe(), "request": asdict(request), "rows": [r.row for r in records]}
        if any(record.row.get("objects") for record in records):
            template = session.template(ref, session.processor(ref))
            records = [grounded(record, template) for record in records]
        engine = session.engine(ref)
        counts = answer_file(engine, records, replace(request, seed=config.seed), Path(output), job, session.events)
    if as_json:
        print_json({"output": output, **counts})
    else:
        failed = f', {counts["failed"]} failed (see their "error")' if counts["failed"] else ""
        click.echo(f"{counts['answered']} rows answered{failed}: {output}")
