"""Options of the engine `vllm`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from swift_core.config import option
from swift_plugin_openai.process_config import ProcessConfig


@dataclass(frozen=True)
class VllmConfig(ProcessConfig):
    """`engine: {name: vllm, dtype: float32}`. Raises ValueError for a number out of range."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "precision of the weights; auto is the checkpoint's"
    )
    max_length: int | None = option(None, "longest prompt and answer together, in tokens; without it the model's own limit")
    max_rows: int = option(64, "answers under way at a time; further ones wait in vLLM")
    cache_gb: float = option(1.0, "key-value cache on a CPU, in GiB")
    memory_share: float = option(0.9, "share of a GPU's memory that vLLM takes")
    compiled: bool = option(True, "compile on CUDA; on a CPU it starts faster without, and runs eagerly")
    max_adapters: int = option(0, "adapters at a time; 0: as many as are loaded before the first request")
    max_rank: int = option(0, "largest rank of an adapter; 0: that of those loaded before the first request")
    arguments: list[str] = option([], "further words of vLLM's own command line")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("max_rows", 1), ("max_adapters", 0), ("max_rank", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length must be at least 1, not {self.max_length}")
        if self.cache_gb <= 0:
            raise ValueError(f"cache_gb must be above 0, not {self.cache_gb}")
        if not 0 < self.memory_share <= 1:
            raise ValueError(f"memory_share must be in (0, 1], not {self.memory_share}")
