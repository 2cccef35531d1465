"""Answers for the engine `llamacpp`."""

from __future__ import annotations

from typing import Any

from swift_core import hookimpl


@hookimpl
def swift_make_engine(engine_id: str, source: Any, config: Any) -> Any:
    if engine_id == "llamacpp":
        from swift_plugin_llamacpp.engine import LlamaCppEngine

        return LlamaCppEngine(source, config)
    return None
