"""Answers for the trainers `classify`, `tag`, `embed`, `rerank`, `reward` and `prm`, and for the row form of the last one."""

from __future__ import annotations

from typing import Any

from swift_core import hookimpl


@hookimpl
def swift_make_trainer(trainer_id: str, run: Any) -> Any:
    if trainer_id in ("classify", "tag", "embed", "rerank", "reward", "prm"):
        from swift_plugin_heads.trainer import HeadTrainer

        return HeadTrainer(trainer_id, run)
    return None


@hookimpl
def swift_make_part(kind: str, part_id: str, run: Any, config: Any) -> Any:
    if (kind, part_id) == ("rows", "steps"):
        from swift_plugin_heads.forms import StepRows

        return StepRows()
    return None
