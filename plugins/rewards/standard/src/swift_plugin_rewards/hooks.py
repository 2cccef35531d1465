"""Answers for the parts of kind `reward`."""

from __future__ import annotations

from typing import Any

from swift_core import hookimpl


@hookimpl
def swift_make_part(kind: str, part_id: str, run: Any, config: Any) -> Any:
    if kind != "reward":
        return None
    from swift_plugin_rewards.build import BUILDERS

    builder = BUILDERS.get(part_id)
    return builder(config, run) if builder else None
