"""`swift-core infer`: every row of a data set answered into a jsonl file."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
from swift_core.cli.common import ARGUMENTS, DATASET, JSON, MODEL, TRUST, config_of, options, print_json
from swift_core.errors import RequestError
from swift_core.events import console_events
from swift_core.session import Opened, Session

from swift_plugin_use.answers import answer_file, chunks_of
from swift_plugin_use.options import ADAPTER, ENGINE, SAMPLING, take_request
from swift_plugin_use.parallel import parallel_chunks
from swift_plugin_use.records import read_records


@click.command()
@options(ARGUMENTS, MODEL, ADAPTER, DATASET, click.option("--output", required=True, metavar="FILE", help="Answers, as jsonl."))
@options(click.option("--metric", "metrics", multiple=True, metavar="NAME", help="Score answers against the rows' own."))
@options(click.option("--nproc", type=click.IntRange(1), default=1, metavar="N", help="Processes, each with an engine [1]."))
@options(SAMPLING, ENGINE, TRUST, JSON)
def infer(
    arguments: tuple[str, ...],
    adapter: str | None,
    output: str,
    metrics: tuple[str, ...],
    nproc: int,
    as_json: bool,
    **flags: Any,
) -> None:
    """Answer every row of a data set into a jsonl file, in order. The same call again goes on after a kill."""
    request = take_request(flags)
    config = config_of(arguments, needs_data=True, **flags)
    with Session(config, console_events()) as session:
        scores = {name: session.part("metric", name) for name in metrics}
        opened = session.opened(adapter) if nproc == 1 else None
        records = read_records(session, opened.template if opened else None)
        job = {"config": config.dump(), "model": model_of(session, adapter, opened), "request": asdict(request)}
        job |= {"metrics": list(metrics), "rows": [record.row for record in records]}
        request = replace(request, seed=config.seed)
        if opened:
            chunks = partial(_alone, opened, records, request)
        else:
            chunks = partial(_together, config, adapter, request, nproc)
        counts = answer_file(chunks, records, Path(output), job, session.events, scores)
    if as_json:
        print_json({"output": output, **counts})
        return
    failed = f', {counts["failed"]} failed (see their "error")' if counts["failed"] else ""
    click.echo(f"{counts['answered']} rows answered{failed}: {output}")
    for name, value in counts.get("metrics", {}).items():
        click.echo(f"{name}: {value:.4f}" + (f" ({counts['unscored']} rows without a score)" if counts["unscored"] else ""))


def _alone(opened: Opened, records: list[Any], request: Any, starts: range) -> Any:
    return chunks_of(opened.engine, records, request, starts, opened.template)


def _together(config: Any, adapter: str | None, request: Any, count: int, starts: range) -> Any:
    return parallel_chunks(config, adapter, request, starts, count) if len(starts) else iter(())


def model_of(session: Session, adapter: str | None, opened: Opened | None = None) -> Any:
    """What answers: the model as it is described, or the address in its place."""
    if opened is not None:
        return opened.ref.describe() if opened.ref else opened.name
    chosen = session.choose("engines", session.config.engine)
    if chosen.contribution.entry.options.get("takes") != "url":
        return session.model_with(adapter).describe()
    if adapter is not None:
        raise RequestError(f"engine {chosen.id} speaks to a server: an adapter is chosen there, by a model's name")
    return session.config.model.name
