"""`swift-core models verify`: which architectures work, tried on tiny models."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import click
from swift_core.cli.common import JSON, options, print_json
from swift_core.errors import RequestError, RunError, did_you_mean
from swift_core.events import console_events
from swift_core.index import build_index
from swift_core.registry import Registry

from swift_plugin_verify.catalog import KINDS, Architecture, choose
from swift_plugin_verify.results import Results, Row, key_of, passes, reasons
from swift_plugin_verify.table import TITLES, counts, page


@click.command("verify")
@options(
    click.option("--architecture", "names", multiple=True, metavar="A", help="A class or a model type; default: all."),
    click.option("--kind", "kinds", multiple=True, type=click.Choice(KINDS), help="Only those of a kind."),
    click.option("--model", "folders", multiple=True, metavar="FOLDER", help="Verify a small model of your own as it is."),
    click.option("--output", default="runs/verify", show_default=True, metavar="DIR", help="Where results.jsonl is kept."),
    click.option("--table", metavar="FILE", help="Write the results as a page, such as docs/models.md."),
    click.option("--jobs", type=click.IntRange(1), metavar="N", help="Architectures at once [the cores]."),
    click.option("--limit", type=float, default=180.0, show_default=True, metavar="SECONDS", help="Time of each."),
    click.option("--again", is_flag=True, help="Forget what an earlier call found; by default it is gone on with."),
    JSON,
)
def verify(
    names: tuple[str, ...], kinds: tuple[str, ...], folders: tuple[str, ...], output: str, table: str | None, jobs: int | None,
    limit: float, again: bool, as_json: bool,
) -> None:  # fmt: skip
    """Try architectures on tiny random models: load, mask, train, save, merge, generate, pack.

    Exit code 1 when one misses a check.
    """
    events = console_events()
    subjects = _subjects(names, kinds, folders)
    results = Results(Path(output), resume=not again)
    todo = [subject for subject in subjects if _key(subject) not in results.rows]
    if len(todo) < len(subjects):
        events.note(f"{output}: {len(subjects) - len(todo)} of {len(subjects)} are known; --again tries them anew")
    from swift_plugin_verify.worker import describe, verify_all

    with tempfile.TemporaryDirectory() as scratch:
        found = verify_all(todo, Path(scratch), jobs or os.cpu_count() or 1, limit)
        for subject, result in events.track(found, "verifying", len(todo)):
            row = results.add({**describe(subject), **result})
            if not as_json:
                click.echo(_line(row))
    rows = [results.rows[_key(subject)] for subject in subjects]
    if table:
        whole = sorted(results.rows.values(), key=key_of)
        Path(table).write_text(page(whole, results.versions, _families()), encoding="utf-8")
    if as_json:
        print_json(rows)
    else:
        for kind, (good, total) in counts(rows).items():
            click.echo(f"{TITLES[kind]}: {good} of {total} pass in full ({good / total:.1%})")
    missing = sum(not passes(row) for row in rows)
    if missing:
        raise RunError(f"{missing} of {len(rows)} miss a check")


def _subjects(names: tuple[str, ...], kinds: tuple[str, ...], folders: tuple[str, ...]) -> list[Architecture | Path]:
    """What to verify. Raises RequestError for a name that no table has, or a folder without a model."""
    if folders:
        if names or kinds:
            raise RequestError("--model verifies a folder as it is; --architecture and --kind choose tiny models: give one")
        for folder in folders:
            if not (Path(folder) / "config.json").is_file():
                raise RequestError(f"{folder} holds no config.json: it is not a model folder.")
        return [Path(folder).absolute() for folder in folders]
    from swift_plugin_verify.worker import list_architectures

    known = list_architectures()
    chosen, unknown = choose(known, names, kinds)
    if unknown:
        near = did_you_mean(unknown[0], [text for one in known for text in (one.name, one.model_type)])
        raise RequestError(f"no architecture {unknown[0]!r} in the installed transformers version.{near}")
    return list(chosen)


def _key(subject: Architecture | Path) -> str:
    return f"folder//{subject}" if isinstance(subject, Path) else subject.key


def _line(row: Row) -> str:
    state = "ok" if passes(row) else "; ".join(reasons(row))
    return f"{row['name']} ({row['model_type'] or 'folder'}), {row['seconds']} s: {state}"


def _families() -> dict[str, str]:
    """By architecture, the installed family that lists it."""
    found: dict[str, Any] = {}
    for contribution in Registry(build_index()).all("models"):
        for name in contribution.entry.options.get("architectures", ()):
            found.setdefault(name, contribution.plugin.name.removeprefix("swift-plugin-"))
    return found
