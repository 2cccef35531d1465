"""`swift-core backends install` and `backends environments`: environments of engines that run in a process of their own."""

from __future__ import annotations

import shutil
import sys
from typing import Any

import click
from swift_core.cli.common import JSON, print_json, print_table
from swift_core.errors import RequestError, did_you_mean

from swift_plugin_openai.environments import home, install, mark_of, read_recipe, recipes, sizes


@click.command("install")
@click.argument("name")
@click.option("--python", metavar="PY", help="The interpreter to make the environment with [this one].")
@click.option("--cuda", is_flag=True, help="For a CUDA GPU [a CPU].")
@click.option("--again", is_flag=True, help="Remove what is there first.")
def install_command(name: str, python: str | None, cuda: bool, again: bool) -> None:
    """Make the environment of engine NAME: exact versions, in the user's cache.

    A call that was stopped is gone on with by the next one; an environment that is not whole is never used.
    """
    known = recipes()
    if name not in known:
        raise RequestError(
            f"no installed engine {name!r} has an environment of its own.{did_you_mean(name, known)} {_have(known)}"
        )
    found = shutil.which(python or sys.executable)
    if found is None:
        raise RequestError(f"--python: {python} is no interpreter")
    recipe = read_recipe(known[name], "cuda" if cuda else "cpu")
    if again:
        click.echo(f"removing {home(name)}")
        shutil.rmtree(home(name), ignore_errors=True)
    folder = install(recipe, found, click.echo)
    click.echo(f"done: engine {name} uses {folder}")


@click.command("environments")
@JSON
def environments_command(as_json: bool) -> None:
    """List the environments of engines: whether they are whole, where they are, their versions and sizes."""
    rows = [_row(name) for name in recipes()]
    if as_json:
        print_json(rows)
    elif rows:
        shown = [(r["engine"], r["state"], r["device"] or "", r["version"] or "", _size(r["bytes"]), r["folder"]) for r in rows]
        print_table(shown, ("engine", "state", "device", "version", "size", "folder"))
    else:
        click.echo("no installed engine has an environment of its own. Install one: pip install swift-plugin-vllm")


def _row(name: str) -> dict[str, Any]:
    folder, mark = home(name), mark_of(name)
    row: dict[str, Any] = {"engine": name, "folder": str(folder), "device": None, "version": None, "bytes": 0, "versions": {}}
    if mark is None:
        state = "begun" if folder.exists() else "not installed"
        return row | {"state": state, "bytes": sum(sizes(folder)) if folder.exists() else 0}
    recipe = read_recipe(recipes()[name], mark["device"])
    state = "installed" if mark["digest"] == recipe.digest else "outdated"
    versions = {package.lower().replace("_", "-"): found for package, found in mark["versions"].items()}
    version = versions.get(recipe.package)
    return row | {
        "state": state, "device": mark["device"], "version": version, "bytes": mark["bytes"], "versions": mark["versions"],
    }  # fmt: skip


def _size(count: int) -> str:
    return f"{count / 1e6:,.0f} MB" if count else ""


def _have(known: dict[str, Any]) -> str:
    return f"Those that do: {', '.join(known)}" if known else "Install one: pip install swift-plugin-vllm"
