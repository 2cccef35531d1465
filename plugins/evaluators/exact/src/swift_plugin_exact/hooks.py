"""Answers for the evaluator `exact`."""

from __future__ import annotations

from typing import Any

from swift_core import hookimpl


@hookimpl
def swift_make_evaluator(evaluator_id: str, config: Any) -> Any:
    if evaluator_id == "exact":
        from swift_plugin_exact.evaluator import ExactEvaluator

        return ExactEvaluator(config)
