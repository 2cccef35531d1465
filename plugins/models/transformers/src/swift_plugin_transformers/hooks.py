"""Answers for the model loader `transformers`, the templates `checkpoint` and `plain`, and those of models with a head."""

from __future__ import annotations

from typing import Any

from swift_core import hookimpl


@hookimpl
def swift_load_processor(model_id: str, source: str, config: Any) -> Any:
    if model_id == "transformers":
        from swift_plugin_transformers.loading import load_processor

        return load_processor(source, config)


@hookimpl
def swift_load_model(model_id: str, source: str, processor: Any, backend: Any, load_kwargs: dict[str, Any], config: Any) -> Any:
    if model_id == "transformers":
        from swift_plugin_transformers.loading import load_model

        return load_model(source, processor, load_kwargs, config)


@hookimpl
def swift_make_template(template_id: str, processor: Any, config: Any) -> Any:
    if template_id in ("checkpoint", "plain"):
        from swift_plugin_transformers.encoder_decoder import decodes, open_template

        if decodes(processor):
            return open_template(processor, config)
    if template_id == "checkpoint":
        from swift_plugin_transformers.chat import ChatTemplate

        return ChatTemplate(processor, config)
    if template_id == "plain":
        from swift_plugin_transformers.plain import PlainTemplate

        return PlainTemplate(processor, config)
    if template_id in ("classify", "tag", "embed", "rerank", "reward"):
        from swift_plugin_transformers.tasks import TEMPLATES

        return TEMPLATES[template_id](processor, config)
