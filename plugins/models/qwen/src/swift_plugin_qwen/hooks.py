"""Answers for the template `qwen`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from swift_core import hookimpl


@hookimpl
def swift_make_template(template_id: str, processor: Any, config: Any) -> Any:
    if template_id == "qwen":
        from swift_plugin_transformers.families import family_template

        return family_template(processor, config, Path(__file__).with_name("qwen.jinja"))
