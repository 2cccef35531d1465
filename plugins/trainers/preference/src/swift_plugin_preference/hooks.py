"""Answers for the trainers `dpo`, `orpo`, `cpo`, `simpo` and `kto`, and their row forms."""

from __future__ import annotations

from typing import Any

from swift_core import hookimpl


@hookimpl
def swift_make_trainer(trainer_id: str, run: Any) -> Any:
    if trainer_id == "kto":
        from swift_plugin_preference.answers import AnswerTrainer

        return AnswerTrainer(run)
    if trainer_id in ("dpo", "orpo", "cpo", "simpo"):
        from swift_plugin_preference.pairs import PairTrainer

        return PairTrainer(trainer_id, run)
    return None


@hookimpl
def swift_make_part(kind: str, part_id: str, run: Any, config: Any) -> Any:
    if kind == "rows" and part_id in ("pairs", "labelled"):
        from swift_plugin_preference import forms

        return forms.PairRows() if part_id == "pairs" else forms.LabelledRows()
    return None
