"""Answers for the part `preparer/standard`."""

from __future__ import annotations

from typing import Any

from swift_core import hookimpl


@hookimpl
def swift_make_part(kind: str, part_id: str, run: Any, config: Any) -> Any:
    if (kind, part_id) == ("preparer", "standard"):
        from swift_plugin_prepare.preparer import StandardPreparer

        return StandardPreparer()
