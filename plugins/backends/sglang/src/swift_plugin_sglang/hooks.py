"""Answers for the engine `sglang`."""

from __future__ import annotations

from typing import Any

from swift_core import hookimpl


@hookimpl
def swift_make_engine(engine_id: str, source: Any, config: Any) -> Any:
    if engine_id == "sglang":
        from swift_plugin_sglang.engine import SglangEngine

        return SglangEngine(source, config)
    return None
