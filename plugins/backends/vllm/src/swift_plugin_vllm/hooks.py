"""Answers for the engine `vllm`."""

from __future__ import annotations

from typing import Any

from swift_core import hookimpl


@hookimpl
def swift_make_engine(engine_id: str, source: Any, config: Any) -> Any:
    if engine_id == "vllm":
        from swift_plugin_vllm.engine import VllmEngine

        return VllmEngine(source, config)
    return None
