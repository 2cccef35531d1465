"""Options of the generic model loader and of its templates. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from swift_core.config import option


@dataclass
class TransformersConfig:
    """`model: {name: FOLDER, attention: eager}`. The last two are the run's flags, set by the session."""

    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = option("auto", "attention implementation")
    revision: str | None = option(None, "branch, tag or commit of a hub id")
    trust_remote_code: bool = field(init=False, default=False)
    allow_pickle: bool = field(init=False, default=False)


@dataclass
class ChatTemplateConfig:
    """`template: {kwargs: {enable_thinking: false}}`."""

    file: str | None = option(None, "a .jinja file to use instead of the checkpoint's template")
    jinja: str | None = option(None, "a chat template as text, instead of the checkpoint's")
    variant: str | None = option(None, "which of the checkpoint's named templates; by default tool_use where there are tools")
    kwargs: dict[str, Any] = option({}, "arguments given to the template; a row's chat_template_kwargs go before them")
    loss: Literal["assistant", "last", "all", "spans"] = option(
        "assistant", "what is trained: every answer, the last one, every token, or answers weighted by template.spans"
    )
    spans: dict[str, float] = option({}, "regular expression: factor of the weight of what it matches in an answer")


@dataclass
class PlainTemplateConfig:
    """`template: {name: plain}`."""

    end: bool = option(True, "add the end-of-text token to each row")
