"""Answers for the engine `openvino`."""

from __future__ import annotations

from typing import Any

from swift_core import hookimpl


@hookimpl
def swift_make_engine(engine_id: str, source: Any, config: Any) -> Any:
    if engine_id == "openvino":
        from swift_plugin_openvino.engine import OpenVINOEngine

        return OpenVINOEngine(source, config)
    return None
