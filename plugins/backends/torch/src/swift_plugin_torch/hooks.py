"""Answers for the backend `torch` and the engine `transformers`."""

from __future__ import annotations

from typing import Any

from swift_core import hookimpl


@hookimpl
def swift_make_launcher(backend_id: str, config: Any) -> Any:
    if backend_id == "torch":
        from swift_plugin_torch.launcher import TorchLauncher

        return TorchLauncher(config)


@hookimpl
def swift_open_backend(backend_id: str, config: Any) -> Any:
    if backend_id == "torch":
        from swift_plugin_torch.backend import TorchBackend

        return TorchBackend(config)


@hookimpl
def swift_make_engine(engine_id: str, source: Any, config: Any) -> Any:
    if engine_id == "transformers":
        from swift_plugin_torch.engine import TransformersEngine

        return TransformersEngine(source, config)
