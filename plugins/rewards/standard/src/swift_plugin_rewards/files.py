"""A user's Python file as a module, and a reward that is a function in it."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import sys
import threading
import types
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from swift_core.errors import RequestError, RunError, one_line
from swift_core.types import Row


def load_module(path: Path, address: str) -> types.ModuleType:
    """A Python file as a module. Raises RequestError where it does not load."""
    name = f"swift_plugin_rewards_file_{path.stem}_{zlib.crc32(str(path.resolve()).encode()):x}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RequestError(f"{address}: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look for it there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as err:
        del sys.modules[name]
        raise RequestError(f"{address}: {path}: {one_line(err)}") from None
    return module


def load_function(file: str, name: str, address: str) -> Callable[..., Any]:
    """What a file defines under a name. Raises RequestError."""
    path = Path(file).expanduser()
    if not path.is_file():
        raise RequestError(f"{address}: no file {file}")
    found = getattr(load_module(path, address), name, None)
    if not callable(found):
        raise RequestError(f"{address}: {file} has no function {name!r}")
    return found  # type: ignore[no-any-return]


class Function:
    """A user's function of completions and rows. An async one is awaited in a thread with an event loop that lasts, so that
    clients which it keeps stay usable; while it waits, other rewards are computed."""

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.function, self.name = function, name
        self.waits = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
        self._loop: asyncio.AbstractEventLoop | None = None

    def __call__(self, completions: list[str], rows: list[Row]) -> list[float | None]:
        """Raises RunError with what the function raised."""
        try:
            found = self.function(completions, rows)
            if inspect.isawaitable(found):
                found = asyncio.run_coroutine_threadsafe(_awaited(found), self._running()).result()
        except RunError:  # a time-out
            raise
        except (Exception, SystemExit) as err:
            raise RunError(f"reward {self.name}: {one_line(err)}") from err
        if isinstance(found, str | dict) or not isinstance(found, Iterable):
            raise RunError(f"reward {self.name}: expected a list with a number for each answer, not {found!r}")
        return list(found)

    def _running(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name=f"reward {self.name}", daemon=True).start()
        return self._loop

    def close(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop = None


async def _awaited(found: Any) -> Any:
    return await found
