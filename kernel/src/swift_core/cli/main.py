"""The lazy `swift-core` group: names and help texts are data here, so that --help imports no command and no plugin."""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import Any

import click

from swift_core import __version__
from swift_core.api import KINDS
from swift_core.errors import RequestError, SwiftError, did_you_mean, one_line

COMMANDS = {
    "train": ("swift_core.cli.train:train", "Train a model: fine-tune, pre-train, align."),
    "inspect": ("swift_core.cli.look:inspect", "Show what a row becomes: its text, its tokens, what is trained."),
    "doctor": ("swift_core.cli.look:doctor", "Show versions, devices, and what installed plugins lack."),
    "models": ("swift_core.cli.lists:models", "List and show models."),
    "plugins": ("swift_core.cli.lists:plugins", "List, show and check installed plugins."),
    "plugin": ("swift_core.cli.lists:plugin", "Make a new plugin."),
    "config": ("swift_core.cli.look:config", "Show a resolved configuration, or its schema."),
}
COMMANDS |= {
    kind: (f"swift_core.cli.lists:{kind}", f"List installed {kind}.")
    for kind in KINDS if kind not in ("models", "commands")
}  # fmt: skip


class LazyGroup(click.Group):
    """Commands by dotted name: the kernel's own, and those of plugins' manifests."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*COMMANDS, *_plugin_commands()]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in COMMANDS:
            module, _, attribute = COMMANDS[name][0].partition(":")
            found: click.Command = getattr(importlib.import_module(module), attribute)
            return WidenedGroup(name, found) if isinstance(found, click.Group) else found
        return _plugin_command(name, list(COMMANDS))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _format(formatter, {name: text for name, (_, text) in COMMANDS.items()}, _plugin_commands())


class WidenedGroup(click.Group):
    """A group of the kernel's with what plugins add to it: a manifest's `name = "models verify"`."""

    def __init__(self, name: str, group: click.Group) -> None:
        super().__init__(name, commands=group.commands, help=group.help, params=group.params)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*sorted(self.commands), *_plugin_commands(f"{self.name} ")]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        whole = f"{self.name} {name}"
        return self.commands.get(name) or _plugin_command(whole, [f"{self.name} {own}" for own in self.commands])

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        own = {name: self.commands[name].get_short_help_str(formatter.width) for name in sorted(self.commands)}
        _format(formatter, own, _plugin_commands(f"{self.name} "))


def _plugin_command(name: str, own: list[str]) -> click.Command:
    """A command of a plugin, imported now. Raises RequestError where there is none; `own` are the kernel's beside it."""
    from swift_core.activate import load_object
    from swift_core.index import build_index
    from swift_core.registry import Registry

    registry = Registry(build_index())
    if lack := registry.missing("commands", name):
        raise lack
    if not registry.has("commands", name):
        group = name.rpartition(" ")[0]
        near = did_you_mean(name, [*own, *(known for known in registry.ids("commands") if known.rpartition(" ")[0] == group)])
        raise RequestError(f"no command {name!r}.{near} See swift-core {f'{group} ' if group else ''}--help")
    contribution = registry.find("commands", name)
    loaded: click.Command = load_object(contribution.entry.options["target"], contribution)
    return loaded


def _format(formatter: click.HelpFormatter, own: dict[str, str], of_plugins: dict[str, str]) -> None:
    for title, rows in (("Commands", own), ("Commands of plugins", of_plugins)):
        if rows:
            with formatter.section(title):
                formatter.write_dl(list(rows.items()))


def _plugin_commands(group: str = "") -> dict[str, str]:
    """Names and help texts of installed plugins' commands, from their manifests: of no group, or of `"models "`."""
    from swift_core.index import build_index

    plugins = build_index().plugins.values()
    entries = [entry for plugin in plugins if plugin.usable for entry in plugin.entries if entry.kind == "commands"]
    found = {entry.id.removeprefix(group): entry.summary for entry in entries if entry.id.startswith(group)}
    return {name: text for name, text in found.items() if " " not in name and (group or name not in COMMANDS)}


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="swift-core %(version)s")
def cli() -> None:
    """Fine-tune language and multimodal models with what you installed.

    Every command takes --debug, which shows the traceback of an error.
    """


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Exit codes: 0 done, 1 the run failed, 2 the request was wrong."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    sys.exit(run(args, debug))


def run(args: list[str], debug: bool) -> int:
    """The exit code of a command; its error, if any, is one line on standard error, and so is a library's warning."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {' '.join(str(message).split())}\n"
    try:
        result: Any = cli.main(args, prog_name="swift-core", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except SwiftError as err:
        return _fail(err, str(err), err.exit_code, debug)
    except click.exceptions.NoArgsIsHelpError as err:
        click.echo(err.format_message())
        return 2
    except click.ClickException as err:
        return _fail(err, " ".join(err.format_message().split()), 2, debug)
    except (click.Abort, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output went away
        sys.stderr.close()
        return 1
    except Exception as err:
        if isinstance(err, OSError) and err.strerror:
            return _fail(err, f"{err.filename}: {err.strerror}" if err.filename else err.strerror, 1, debug)
        return _fail(err, f"unexpected {one_line(err)} (--debug shows the traceback)", 1, debug)


def _fail(err: BaseException, text: str, code: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exception(err)
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
