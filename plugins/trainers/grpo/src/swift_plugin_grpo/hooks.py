"""Answers for the trainer `grpo` and its presets, and for the parts `rows/prompts` and `environment/tools`."""

from __future__ import annotations

from typing import Any

from swift_core import hookimpl

TRAINERS = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "rloo", "reinforce_plus_plus")
"""One loop; the others are its presets."""


@hookimpl
def swift_make_trainer(trainer_id: str, run: Any) -> Any:
    if trainer_id in TRAINERS:
        from swift_plugin_grpo.loop import GrpoTrainer

        return GrpoTrainer(run)
    return None


@hookimpl
def swift_make_part(kind: str, part_id: str, run: Any, config: Any) -> Any:
    if (kind, part_id) == ("rows", "prompts"):
        from swift_plugin_grpo.prompts import PromptForm

        return PromptForm()
    if (kind, part_id) == ("environment", "tools"):
        from swift_plugin_grpo.environments import tool_factory

        return tool_factory(config.functions)
    return None
