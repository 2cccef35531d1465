"""Imports the plugins that a run uses, and calls their hooks: the second and third wall.

A plugin that cannot be imported or registered is left out, and named in one line; a hook that raises or returns the
wrong thing becomes a `PluginError` with the cause.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from inspect import signature
from typing import Any, TypeVar

import pluggy

from swift_core.config import build_options
from swift_core.errors import PluginError, PluginLoadError, SwiftError, did_you_mean, one_line
from swift_core.hookspecs import SwiftSpecs
from swift_core.registry import Contribution, check_requires

T = TypeVar("T")


def load_object(dotted: str, contribution: Contribution) -> Any:
    """The object behind `module:name` of a manifest. Raises PluginLoadError naming the plugin."""
    module, _, name = dotted.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as err:
        raise PluginLoadError(_import_failure(contribution, err)) from err


def load_options(contribution: Contribution, raw: dict[str, Any], address: str | None = None) -> Any:
    """The contribution's options dataclass, filled from raw values and checked."""
    cls = load_object(contribution.entry.config, contribution) if contribution.entry.config else None
    return build_options(cls, raw, address or contribution.address)


class Activator:
    """Holds the pluggy manager of one run. Only plugins that `activate` names are imported."""

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager("swift")
        self.manager.add_hookspecs(SwiftSpecs)
        self.trace = os.environ.get("SWIFT_TRACE_HOOKS", "") not in ("", "0")

    def activate(self, contributions: Iterable[Contribution]) -> None:
        """Import and register the plugins of these contributions, in sorted order. Raises PluginLoadError."""
        for contribution in sorted(contributions, key=lambda c: c.plugin.name):
            lack = check_requires(contribution)
            if lack:
                raise PluginLoadError(f"{_origin(contribution)}: {lack}")
            manifest = contribution.plugin.manifest
            if manifest is None or manifest.hooks is None or self.manager.has_plugin(contribution.plugin.name):
                continue
            try:
                module = importlib.import_module(manifest.hooks)
            except (Exception, SystemExit) as err:
                raise PluginLoadError(_import_failure(contribution, err)) from err
            try:
                self.manager.register(module, contribution.plugin.name)
                self.manager.check_pending()
            except pluggy.PluginValidationError as err:
                self.manager.unregister(name=contribution.plugin.name)
                raise PluginLoadError(f"{_origin(contribution)}, whose hooks do not fit: {_misfit(module, err)}") from err

    def call(self, contribution: Contribution, hook: str, protocol: type[T], **kwargs: Any) -> T:
        """Call a firstresult hook for an id, and check the result; a `protocol` of object takes any. Raises PluginError."""
        self.activate([contribution])
        owner = contribution.plugin.name
        result = self._guarded(owner, hook, getattr(self.manager.hook, hook), kwargs)
        if result is None:
            raise PluginError(owner, hook, f"it claims {contribution.id!r} in its manifest and returned None")
        if not isinstance(result, protocol):
            lacks = missing_members(result, protocol)
            raise PluginError(owner, hook, f"{type(result).__name__} is not a {protocol.__name__}: it lacks {lacks}")
        return result

    def call_each(self, contributions: list[Contribution], hook: str, **kwargs: Any) -> list[Any]:
        """Call a collecting hook plugin by plugin, so that one's fault is known as its own. Raises PluginError."""
        self.activate(contributions)
        results: list[Any] = []
        for name in sorted({contribution.plugin.name for contribution in contributions}):
            others = [plugin for other, plugin in self.manager.list_name_plugin() if other != name]
            # Consumed inside the guard: a hook may be a generator, whose code runs only then.
            collect = partial(_collect, self.manager.subset_hook_caller(hook, others))
            results += self._guarded(name, hook, collect, kwargs)
        return results

    def _guarded(self, owner: str, hook: str, caller: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """The third wall: what a hook raises becomes a PluginError. A SwiftError is meant for the user, and passes."""
        started = time.perf_counter()
        try:
            return caller(**kwargs)
        except SwiftError:
            raise
        except (Exception, SystemExit) as err:
            raise PluginError(self._culprit(err, owner), hook, one_line(err)) from err
        finally:
            if self.trace:
                shown = ", ".join(f"{key}={_short(value)}" for key, value in kwargs.items())
                print(f"hook {hook}({shown}) {time.perf_counter() - started:.3f} s", file=sys.stderr)

    def _culprit(self, err: BaseException, owner: str) -> str:
        """The activated plugin whose code raised: a wrapper of another plugin may be to blame."""
        packages = {
            str(getattr(module, "__name__", "")).partition(".")[0]: name for name, module in self.manager.list_name_plugin()
        }
        blamed, trace = owner, err.__traceback__
        while trace is not None:
            blamed = packages.get(str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0], blamed)
            trace = trace.tb_next
        return blamed


def missing_members(value: Any, protocol: type) -> str:
    """The members of a Protocol that `value` lacks, for an error message."""
    methods = {name for name, member in vars(protocol).items() if callable(member) and not name.startswith("_")}
    members = methods | set(getattr(protocol, "__annotations__", {}))
    return ", ".join(sorted(name for name in members if not hasattr(value, name))) or "nothing"


def _collect(caller: Callable[..., Any], **kwargs: Any) -> list[Any]:
    return [item for made in caller(**kwargs) for item in made or ()]


def _origin(contribution: Contribution) -> str:
    plugin = contribution.plugin
    return f"{contribution.entry.singular} {contribution.id!r} comes from {plugin.name} {plugin.version}"


def _import_failure(contribution: Contribution, err: BaseException) -> str:
    return f"{_origin(contribution)}, which failed to import: {one_line(err)} (--debug shows the traceback)"


def _misfit(module: Any, err: Exception) -> str:
    """Which hook or argument of a module is unknown. pluggy's own complaint names paths, and sets in any order."""
    specs = {name: list(signature(spec).parameters)[1:] for name, spec in vars(SwiftSpecs).items() if name.startswith("swift_")}
    for name, hook in vars(module).items():
        if not hasattr(hook, "swift_impl"):
            continue
        name = hook.swift_impl.get("specname") or name
        if name not in specs:
            return f"unknown hook {name!r}.{did_you_mean(name, specs)}"
        for argument in signature(hook).parameters:
            if argument not in specs[name]:
                return f"{name} has no argument {argument!r}; it has: {', '.join(specs[name])}"
    return " ".join(str(err).split())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"<{type(value).__name__}>"
