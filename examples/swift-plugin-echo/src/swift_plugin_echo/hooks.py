"""Answers the kernel for the engine `echo` and the metric `length`."""

from __future__ import annotations

from typing import Any

from swift_core import hookimpl


@hookimpl
def swift_make_engine(engine_id: str, source: Any, config: Any) -> Any:
    if engine_id == "echo":
        from swift_plugin_echo.engine import EchoEngine

        return EchoEngine(config)
    return None


@hookimpl
def swift_make_part(kind: str, part_id: str, run: Any, config: Any) -> Any:
    if (kind, part_id) == ("metric", "length"):
        from swift_plugin_echo.length import length

        return length
    return None
