"""Answers for the quantizer `hqq`."""

from __future__ import annotations

from typing import Any

from swift_core import hookimpl


@hookimpl
def swift_make_quantizer(quantizer_id: str, config: Any) -> Any:
    if quantizer_id == "hqq":
        from swift_plugin_hqq.quantizer import HqqQuantizer

        return HqqQuantizer(config)
