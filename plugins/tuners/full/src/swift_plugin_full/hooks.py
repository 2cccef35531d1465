"""Answers for the tuner `full`."""

from __future__ import annotations

from typing import Any

from swift_core import hookimpl


@hookimpl
def swift_apply_tuner(tuner_id: str, bundle: Any, config: Any) -> Any:
    if tuner_id == "full":
        from swift_plugin_full.tuner import FullTuned

        return FullTuned(bundle, config)
