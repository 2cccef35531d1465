"""Adapters loaded and unloaded while the server runs, from one folder that its owner named."""

from __future__ import annotations

from pathlib import Path

from swift_core.errors import RequestError
from swift_core.rundir import Checkpoints

from swift_plugin_serve.errors import ApiError
from swift_plugin_serve.generation import called
from swift_plugin_serve.served import Served


async def load(served: Served, name: str, path: str) -> None:
    """Load the adapter in a folder below the root. Raises ApiError."""
    served.needs("adapters", "loading an adapter")
    folder = allowed(served.settings.adapter_root, path)
    if name in served.names():
        raise ApiError(400, f"the name {name!r} is taken: unload it first, or choose another", param="name")

    def work() -> None:
        served.engine.load_adapter(name, folder)
        served.adapters[name] = folder

    await called(served, work)


async def unload(served: Served, name: str) -> None:
    """Forget an adapter; requests that use it are finished first. Raises ApiError."""
    if name not in served.adapters:
        raise ApiError(404, f"adapter {name!r} is not loaded; loaded: {', '.join(served.adapters) or 'none'}", param="name")
    folder = served.adapters.pop(name)  # at once, so that no new request is taken for it

    def work() -> None:
        try:
            served.engine.unload_adapter(name)
        except BaseException:
            served.adapters[name] = folder
            raise

    await called(served, work)


def allowed(root: Path | None, path: str) -> Path:
    """The adapter's folder, if it lies in the root, links followed. Raises ApiError."""
    if root is None:
        raise ApiError(403, "loading adapters at run time is off: it needs the server's option --adapter-root DIR")
    try:
        folder = (root / path).resolve()
        inside, there = folder.is_relative_to(root.resolve()), folder.is_dir()
    except (OSError, ValueError):  # a name that is too long, or holds a zero byte
        inside, there = True, False
    if not inside:
        raise ApiError(403, "path: the folder lies outside of the server's --adapter-root", param="path")
    if not there:
        raise ApiError(400, f"path: no folder {path!r} in the server's --adapter-root", param="path")
    try:
        if (folder / "checkpoints").is_dir():
            folder = Checkpoints(folder).last_of_run()
    except RequestError as err:
        raise ApiError(400, f"path: {err}", param="path") from None
    if not (folder / "adapter_config.json").is_file():
        raise ApiError(400, f"path: {path!r} holds no adapter_config.json", param="path")
    return folder
