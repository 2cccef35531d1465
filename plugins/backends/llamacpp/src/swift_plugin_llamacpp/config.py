"""Options of the engine `llamacpp`."""

from __future__ import annotations

from dataclasses import dataclass

from swift_core.config import option
from swift_plugin_openai.process_config import ProcessConfig


@dataclass(frozen=True)
class LlamaCppConfig(ProcessConfig):
    """`engine: {name: llamacpp, gguf: model.gguf}`. Raises ValueError for a number out of range."""

    gguf: str | None = option(None, "the GGUF file; without it the only one in the model's folder")
    max_length: int = option(4096, "longest prompt and answer together, in tokens")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, not {self.max_length}")
