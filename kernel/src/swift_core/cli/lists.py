"""`swift-core X list`, `models show`, `plugins list|show|check`, `plugin new`: read from manifests; no plugin is imported."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from swift_core.api import KINDS
from swift_core.cli.common import JSON, print_fields, print_json, print_table
from swift_core.errors import RequestError, SwiftError, did_you_mean
from swift_core.index import Plugin, PluginIndex, build_index, plugin_name
from swift_core.registry import Contribution, Registry, plugin_faults, plugin_problem


def _list_group(kind: str) -> click.Group:
    """The group `swift-core KIND` with its command `list`."""

    @click.group(kind, help=f"Installed {kind}.")
    def group() -> None: ...

    @group.command("list", help=f"List installed {kind}.")
    @JSON
    def list_(as_json: bool) -> None:
        registry = Registry(build_index())
        rows = [_describe(contribution) for contribution in registry.all(kind)]
        if as_json:
            print_json(rows)
        elif rows:
            print_table([(row["id"], row["plugin"], row["summary"]) for row in rows], ("id", "plugin", "summary"))
        else:
            _none(registry, kind)

    return group


def _none(registry: Registry, kind: str) -> None:
    known = registry.suggestions(kind)
    hint = f" Install one: pip install {known[0]}" if known else " Write one: swift-core plugin new NAME"
    more = ", ".join(known[1:5]) + (f" and {len(known) - 5} more" if known[5:] else "")
    click.echo(f"no {kind} installed.{hint}" + (f" (also: {more})" if more else ""))


def _describe(contribution: Contribution) -> dict[str, Any]:
    entry, plugin = contribution.entry, contribution.plugin
    row: dict[str, Any] = {"id": entry.id, "plugin": plugin.name, "version": plugin.version, "summary": entry.summary}
    if entry.kind == "models":
        row |= {"kind": "loader" if entry.options.get("generic") else "model" if entry.options.get("source") else "family"}
        row |= {"family": plugin.name.removeprefix("swift-plugin-"), "checkpoints": entry.options.get("checkpoints")}
        row |= {"architectures": entry.options.get("architectures", []), "capabilities": list(entry.capabilities)}
    return row


GROUPS = {kind: _list_group(kind) for kind in KINDS if kind != "commands"}
globals().update(GROUPS)  # the lazy group asks for them by name


@GROUPS["models"].command("list")
@click.option("--family", metavar="F", help="The checkpoints of one family.")
@click.option("--checkpoints", is_flag=True, help="Every checkpoint, not only the families.")
@JSON
def models_list(family: str | None, checkpoints: bool, as_json: bool) -> None:
    """List model families, loaders and the checkpoints that each family names; --json holds all of them."""
    registry = Registry(build_index())
    entries = [_describe(contribution) for contribution in registry.all("models")]
    rows = [row for contribution in registry.all("models") for row in _checkpoint_rows(registry, contribution)]
    if family is not None:
        known = sorted({row["family"] for row in entries})
        if family not in known:
            raise RequestError(f"no family {family!r} is installed.{did_you_mean(family, known)} Installed: {', '.join(known)}")
        entries, rows = ([row for row in table if row["family"] == family] for table in (entries, rows))
    if as_json:  # a row a line: indenting so many would take longer than everything before it
        click.echo("[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in [*entries, *rows]) + "\n]")
    elif checkpoints or family is not None:
        print_table([(row["id"], row["family"], row["architecture"], ", ".join(row["capabilities"])) for row in rows],
                    ("id", "family", "architecture", "capabilities"))  # fmt: skip
    elif not entries:
        _none(registry, "models")
    else:
        counts = Counter(row["family"] for row in rows)
        shown: list[tuple[str, ...]] = [
            (r["id"], str(counts[r["family"]] if r["checkpoints"] else ""), r["plugin"], r["summary"]) for r in entries
        ]
        print_table(shown, ("id", "checkpoints", "plugin", "summary"))
        click.echo(f"{len(rows):,} checkpoints of {len(counts)} families: list them with --checkpoints or --family F")


def _checkpoint_rows(registry: Registry, contribution: Contribution) -> Iterator[dict[str, Any]]:
    """The checkpoints of a family as `models list` shows them."""
    common = {"family": contribution.plugin.name.removeprefix("swift-plugin-"), "plugin": contribution.plugin.name}
    for row in registry.checkpoints(contribution):
        yield {"id": row["id"], "kind": "checkpoint", **common, "architecture": None, "capabilities": [], "remote_code": False,
               **row}  # fmt: skip


@GROUPS["models"].command("show")
@click.argument("name", metavar="ID")
@JSON
def models_show(name: str, as_json: bool) -> None:
    """Show what a model name resolves to: family, architecture, template, folder."""
    from swift_core.config import Component
    from swift_core.models import resolve_model

    shown = resolve_model(Registry(build_index()), Component(name)).describe()
    if not as_json:
        needed = {True: "needed: loading asks for --trust-remote-code", False: "not needed", None: "unknown until it is loaded"}
        shown["remote_code"] = needed[shown["remote_code"]]
    print_fields(shown, as_json)


@click.group()
def plugins() -> None:
    """Installed plugins."""


@plugins.command("list")
@JSON
def plugins_list(as_json: bool) -> None:
    """List installed plugins with their state; a plugin that cannot be used says why."""
    index = build_index()
    rows = [_plugin_row(plugin) for plugin in index.plugins.values()]
    if as_json:
        print_json(rows)
        return
    if not rows:
        click.echo(
            "no plugins installed. Install some: pip install swift-plugin-transformers swift-plugin-torch swift-plugin-lora"
        )
        return
    print_table([(r["name"], r["version"], r["status"], ", ".join(r["provides"])) for r in rows],
                ("plugin", "version", "status", "provides"))  # fmt: skip
    for row in rows:
        if row["reason"]:
            click.echo(f"{row['name']}: {row['reason']}")


def _plugin_row(plugin: Plugin) -> dict[str, Any]:
    api = f"{plugin.manifest.api[0]}.{plugin.manifest.api[1]}" if plugin.manifest else None
    return {
        "name": plugin.name, "version": plugin.version, "status": plugin.status, "api": api, "reason": plugin_faults(plugin),
        "summary": plugin.manifest.summary if plugin.manifest else "",
        "provides": [f"{entry.singular}:{entry.id}" for entry in plugin.entries],
    }  # fmt: skip


def _find_plugin(index: PluginIndex, name: str) -> Plugin:
    plugin = index.plugins.get(plugin_name(name)) or index.plugins.get(name)
    if plugin is None:
        raise RequestError(f"no plugin {name!r} is installed.{did_you_mean(plugin_name(name), index.plugins)}")
    return plugin


@plugins.command("show")
@click.argument("name")
@JSON
def plugins_show(name: str, as_json: bool) -> None:
    """Show one plugin: its state, what it provides and what that needs."""
    plugin = _find_plugin(build_index(), name)
    row = _plugin_row(plugin)
    row["requires"] = sorted({text for entry in plugin.entries for text in entry.requires})
    row["manifest"] = str(plugin.manifest.path) if plugin.manifest else None
    print_fields(row, as_json)


@plugins.command("check")
@click.argument("names", nargs=-1)
@JSON
def plugins_check(names: tuple[str, ...], as_json: bool) -> None:
    """Check that plugins import and that their hooks fit; those named here also keep to the contracts of their kinds.

    Exit code 1 when one does not.
    """
    index, rows = build_index(), []
    for plugin in [_find_plugin(index, name) for name in names] or index.plugins.values():
        row: dict[str, Any] = {"name": plugin.name, "version": plugin.version, "fault": _fault(plugin), "checks": []}
        if names and not row["fault"]:
            row["checks"], row["fault"] = _contracts(plugin)
        rows.append(row)
        for line in [] if as_json else _check_lines(row):
            click.echo(line)
    if as_json:
        print_json(rows)
    if broken := sum(bool(row["fault"]) for row in rows):
        raise SwiftError(f"{broken} of {len(rows)} plugins cannot be used" if not names else f"{broken} of {len(rows)} fail")


def _contracts(plugin: Plugin) -> tuple[list[dict[str, str]], str]:
    """The checks of a plugin's contracts, and the fault that they come to."""
    from dataclasses import asdict

    from swift_core.events import console_events
    from swift_core.testing.check import check_plugin

    with console_events().task(f"checking {plugin.name}"):
        checks = [asdict(check) for check in check_plugin(plugin)]
    failed = sum(check["outcome"] == "failed" for check in checks)
    return checks, f"{failed} of {len(checks)} checks failed" if failed else ""


def _check_lines(row: dict[str, Any]) -> Iterator[str]:
    held = f" ({sum(check['outcome'] == 'ok' for check in row['checks'])} checks)" if row["checks"] else ""
    yield f"{row['name']} {row['version']}: {row['fault'] or 'ok' + held}"
    for check in row["checks"]:
        if check["outcome"] != "ok":
            yield f"  {check['outcome']}: {check['name']}: {check['reason']}"


def _fault(plugin: Plugin) -> str:
    """Why a plugin cannot be used: what the index or its metadata say, else what importing brings out."""
    from swift_core.activate import Activator, load_object

    if problem := plugin_problem(plugin):
        return problem
    contributions = [Contribution(entry, plugin) for entry in plugin.entries]
    try:
        Activator().activate(contributions[:1])
        for contribution in contributions:
            for dotted in (contribution.entry.config, contribution.entry.options.get("target")):
                if dotted:
                    load_object(dotted, contribution)
    except SwiftError as err:
        return str(err)
    return ""


@click.group()
def plugin() -> None:
    """Make plugins."""


@plugin.command("new")
@click.argument("name")
@click.option("--kind", required=True, metavar="KIND", help=f"What it offers: {', '.join(KINDS.values())}.")
@click.option("--output", metavar="DIR", help="Where to write it [./swift-plugin-NAME].")
def plugin_new(name: str, kind: str, output: str | None) -> None:
    """Write a plugin that installs and passes its contract as it is."""
    from swift_core.cli.scaffold import write_plugin

    written = write_plugin(name, kind, Path(output or f"swift-plugin-{name.removeprefix('swift-plugin-')}"))
    click.echo(f"wrote {written}\nnext: pip install -e '{written}[test]' && pytest {written}")
