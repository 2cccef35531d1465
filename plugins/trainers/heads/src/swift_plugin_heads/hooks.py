"""Answers for the trainers `classify`, `tag`, `embed`, `rerank` and `reward`."""

from __future__ import annotations

from typing import Any

from swift_core import hookimpl


@hookimpl
def swift_make_trainer(trainer_id: str, run: Any) -> Any:
    if trainer_id in ("classify", "tag", "embed", "rerank", "reward"):
        from swift_plugin_heads.trainer import HeadTrainer

        return HeadTrainer(trainer_id, run)
