"""Answers for the trainer `ppo`."""

from __future__ import annotations

from typing import Any

from swift_core import hookimpl


@hookimpl
def swift_make_trainer(trainer_id: str, run: Any) -> Any:
    if trainer_id == "ppo":
        from swift_plugin_ppo.loop import PpoTrainer

        return PpoTrainer(run)
    return None
