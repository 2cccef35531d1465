"""Answers for the evaluator `exact`, and for its metrics as parts."""

from __future__ import annotations

from typing import Any

from swift_core import hookimpl


@hookimpl
def swift_make_evaluator(evaluator_id: str, config: Any) -> Any:
    if evaluator_id == "exact":
        from swift_plugin_exact.evaluator import ExactEvaluator

        return ExactEvaluator(config)


@hookimpl
def swift_make_part(kind: str, part_id: str, run: Any, config: Any) -> Any:
    if kind == "metric" and part_id in ("accuracy", "exact_match", "token_f1", "rouge_l"):
        from swift_plugin_exact.metrics import make_metrics

        return make_metrics([part_id], normalise=True, part=lambda kind, name: None)[part_id]
    return None
