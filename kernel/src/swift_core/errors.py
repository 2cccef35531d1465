"""The errors that a user meets: each prints as one line, says what to do, and carries its exit code.

`RequestError` (2) is a wrong request; `RunError` (1) a run that failed. Everything else derives from these two.
"""

from __future__ import annotations

from collections.abc import Iterable


class SwiftError(Exception):
    """Base of all errors that the kernel reports in one line instead of a traceback."""

    exit_code = 1


class RequestError(SwiftError):
    """The request was wrong: an unknown name, a bad option, a missing file."""

    exit_code = 2


class RunError(SwiftError):
    """The request was right and the run failed."""


class Interrupted(RunError):
    """The user stopped the run; the message says how to continue it."""


class PluginLoadError(RequestError):
    """A plugin that the run asked for is broken, incompatible or lacks a requirement."""


class PluginError(RunError):
    """A plugin's hook raised, or returned something that does not satisfy its Protocol.

    Attributes: `plugin` (distribution name), `hook` (hook name). The cause is in `__cause__`.
    """

    def __init__(self, plugin: str, hook: str, message: str) -> None:
        super().__init__(f"{plugin} failed in {hook}: {message}")
        self.plugin = plugin
        self.hook = hook


class RowError(RequestError):
    """A data row cannot be used. `where` is its file and line, `reason` what is wrong with it."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.where = where
        self.reason = reason


class CapabilityError(RequestError):
    """Something was asked of an object that its capabilities do not include."""


def one_line(err: BaseException) -> str:
    """`ValueError: the text of it`, whatever line breaks it holds."""
    return f"{type(err).__name__}: {' '.join(str(err).split())}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" Did you mean: lora?"`, or the empty string when nothing known is near `name`."""
    import difflib  # only when something is wrong

    near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6)
    return f" Did you mean: {', '.join(near)}?" if near else ""
