"""Answers for the engine `openai`."""

from __future__ import annotations

from typing import Any

from swift_core import hookimpl


@hookimpl
def swift_make_engine(engine_id: str, source: Any, config: Any) -> Any:
    if engine_id == "openai":
        from swift_plugin_openai.engine import OpenAIEngine

        return OpenAIEngine(source, config)
    return None
