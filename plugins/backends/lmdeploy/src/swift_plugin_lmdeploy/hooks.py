"""Answers for the engine `lmdeploy`."""

from __future__ import annotations

from typing import Any

from swift_core import hookimpl


@hookimpl
def swift_make_engine(engine_id: str, source: Any, config: Any) -> Any:
    if engine_id == "lmdeploy":
        from swift_plugin_lmdeploy.engine import LmdeployEngine

        return LmdeployEngine(source, config)
    return None
