"""Answers for the trainers `sft` and `pt`."""

from __future__ import annotations

from typing import Any

from swift_core import hookimpl


@hookimpl
def swift_make_trainer(trainer_id: str, run: Any) -> Any:
    if trainer_id in ("sft", "pt"):
        from swift_plugin_supervised.loop import SupervisedTrainer

        return SupervisedTrainer(run)
