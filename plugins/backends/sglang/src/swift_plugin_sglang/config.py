"""Options of the engine `sglang`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from swift_core.config import option
from swift_plugin_openai.process_config import ProcessConfig


@dataclass(frozen=True)
class SglangConfig(ProcessConfig):
    """`engine: {name: sglang, dtype: bfloat16}`. Raises ValueError for a number out of range."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "precision of the weights; auto is the checkpoint's"
    )
    max_length: int | None = option(None, "longest prompt and answer together, in tokens; without it the model's own limit")
    memory_share: float = option(0.85, "share of a GPU's memory for weights and cache")
    max_adapters: int = option(4, "adapters in one batch")
    max_rank: int = option(64, "largest rank of an adapter")
    arguments: list[str] = option([], "further words of SGLang's own command line")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_adapters", "max_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.memory_share < 1:
            raise ValueError(f"memory_share must be in (0, 1), not {self.memory_share}")
