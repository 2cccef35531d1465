"""`swift-core X list`, `models show`, `plugins list|show|check`, `plugin new`: read from manifests; no plugin is imported."""

from __future__ import annotations

import importlib
from typing import Any

import click

from swift_core.api import KINDS
from swift_core.cli.common import JSON, print_json, print_table
from swift_core.errors import RequestError, SwiftError, did_you_mean
from swift_core.index import Plugin, PluginIndex, build_index, plugin_name
from swift_core.registry import Contribution, Registry, plugin_faults


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
            known = registry.suggestions(kind)
            hint = f" Install one: pip install {known[0]}" if known else " Write one: swift-core plugin new NAME"
            click.echo(f"no {kind} installed.{hint}" + (f" (also: {', '.join(known[1:])})" if known[1:] else ""))

    return group


def _describe(contribution: Contribution) -> dict[str, Any]:
    entry, plugin = contribution.entry, contribution.plugin
    row: dict[str, Any] = {"id": entry.id, "plugin": plugin.name, "version": plugin.version, "summary": entry.summary}
    if entry.kind == "models":
        row |= {"architectures": entry.options.get("architectures", []), "capabilities": list(entry.capabilities)}
    return row


GROUPS = {kind: _list_group(kind) for kind in KINDS if kind != "commands"}
globals().update(GROUPS)  # the lazy group asks for them by name


@GROUPS["models"].command("show")
@click.argument("name", metavar="ID")
@JSON
def models_show(name: str, as_json: bool) -> None:
    """Show what a model name resolves to: family, architecture, template, folder."""
    from swift_core.config import Component
    from swift_core.models import resolve_model

    shown = resolve_model(Registry(build_index()), Component(name)).describe()
    if as_json:
        print_json(shown)
    else:
        print_table([(key, str(value)) for key, value in shown.items()], ("field", "value"))


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
    if as_json:
        print_json(row)
    else:
        print_table([(k, ", ".join(v) if isinstance(v, list) else str(v or "")) for k, v in row.items()], ("field", "value"))


@plugins.command("check")
@click.argument("names", nargs=-1)
@JSON
def plugins_check(names: tuple[str, ...], as_json: bool) -> None:
    """Import plugins and check that their hooks fit. Exit code 1 when one does not."""
    index = build_index()
    chosen = [_find_plugin(index, name) for name in names] or list(index.plugins.values())
    rows = [{"name": plugin.name, "version": plugin.version, "fault": _check(plugin)} for plugin in chosen]
    if as_json:
        print_json(rows)
    else:
        for row in rows:
            click.echo(f"{row['name']} {row['version']}: {row['fault'] or 'ok'}")
    if any(row["fault"] for row in rows):
        raise SwiftError(f"{sum(bool(row['fault']) for row in rows)} of {len(rows)} plugins cannot be used")


def _check(plugin: Plugin) -> str:
    from swift_core.activate import Activator, load_object

    fault = plugin_faults(plugin)
    if fault:
        return f"{plugin.status if plugin.status != 'READY' else 'LACKS'}: {fault}"
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
    from pathlib import Path

    scaffold = importlib.import_module("swift_core.cli.scaffold")
    written = scaffold.write_plugin(
        name, kind, Path(output) if output else Path(f"swift-plugin-{name.removeprefix('swift-plugin-')}")
    )
    click.echo(f"wrote {written}\nnext: pip install -e '{written}[test]' && pytest {written}")
