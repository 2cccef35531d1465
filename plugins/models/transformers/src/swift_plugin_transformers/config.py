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
    kwargs: dict[str, Any] = option({}, "arguments given to the template")
    turns: Literal["all", "last"] = option("all", "which assistant turns are trained")


@dataclass
class PlainTemplateConfig:
    """`template: {name: plain}`."""

    end: bool = option(True, "add the end-of-text token to each row")
