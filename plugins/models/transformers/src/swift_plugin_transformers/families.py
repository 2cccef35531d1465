"""The template of a family for its checkpoints that ship none.

The template is a Jinja file of the family's plugin, rendered and masked like any checkpoint's own. What the user names (a
file, a text, a variant of the checkpoint's) goes before it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from swift_plugin_transformers.config import ChatTemplateConfig


def family_template(processor: Any, config: ChatTemplateConfig, file: Path) -> Any:
    """A ChatTemplate that renders with `file`, for a family's `swift_make_template`."""
    from swift_plugin_transformers.chat import ChatTemplate
    from swift_plugin_transformers.encoder_decoder import decodes, open_template

    named = config.file or config.jinja or config.variant
    make = open_template if decodes(processor) else ChatTemplate
    return make(processor, config if named else replace(config, file=str(file)))
