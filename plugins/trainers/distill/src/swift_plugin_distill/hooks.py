"""Answers for the trainer `gkd` and the row form `distill`."""

from __future__ import annotations

from typing import Any

from swift_core import hookimpl


@hookimpl
def swift_make_trainer(trainer_id: str, run: Any) -> Any:
    if trainer_id == "gkd":
        from swift_plugin_distill.trainer import GkdTrainer

        return GkdTrainer(run)
    return None


@hookimpl
def swift_make_part(kind: str, part_id: str, run: Any, config: Any) -> Any:
    if (kind, part_id) == ("rows", "distill"):
        from swift_plugin_distill.rows import DistillRows

        return DistillRows()
    return None
