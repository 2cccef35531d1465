"""What an installed family says of a model: its template for checkpoints that ship none, and names of parts.

The template is a Jinja file of the family's plugin, rendered and masked like any checkpoint's own. What the user names (a
file, a text, a variant of the checkpoint's) goes before it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from swift_core.index import build_index
from swift_core.registry import Registry

from swift_plugin_transformers.config import ChatTemplateConfig


def family_template(processor: Any, config: ChatTemplateConfig, file: Path) -> Any:
    """A ChatTemplate that renders with `file`, for a family's `swift_make_template`."""
    from swift_plugin_transformers.chat import ChatTemplate

    named = config.file or config.jinja or config.variant
    return ChatTemplate(processor, config if named else replace(config, file=str(file)))


def family_parts(config: Any) -> dict[str, list[str]]:
    """The `[models.parts]` of the installed family of a model's configuration, for `find_parts`. Nothing where families that
    differ in them claim the model: then its structure alone says."""
    architecture = next(iter(config.architectures or ()), None)
    found = [c.entry.options.get("parts", {}) for c in Registry(build_index()).families(architecture, config.model_type)]
    return dict(found[0]) if found and all(parts == found[0] for parts in found) else {}
