"""Answers for the tuner `lora`."""

from __future__ import annotations

from typing import Any

from swift_core import hookimpl


@hookimpl
def swift_apply_tuner(tuner_id: str, bundle: Any, config: Any) -> Any:
    if tuner_id == "lora":
        from swift_plugin_lora.tuner import LoraTuned

        return LoraTuned(bundle, config)
