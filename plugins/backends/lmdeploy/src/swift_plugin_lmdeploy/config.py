"""Options of the engine `lmdeploy`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from swift_core.config import option
from swift_plugin_openai.process_config import ProcessConfig


@dataclass(frozen=True)
class LmdeployConfig(ProcessConfig):
    """`engine: {name: lmdeploy, backend: pytorch}`. Raises ValueError for a number out of range."""

    backend: Literal["turbomind", "pytorch"] = option("pytorch", "LMDeploy's own engine to run; adapters need pytorch")
    dtype: Literal["auto", "bfloat16", "float16"] = option("auto", "precision of the weights; auto is the checkpoint's")
    max_length: int | None = option(None, "longest prompt and answer together, in tokens; without it the model's own limit")
    memory_share: float = option(0.8, "share of a GPU's free memory for the key-value cache")
    arguments: list[str] = option([], "further words of LMDeploy's own command line")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.memory_share < 1:
            raise ValueError(f"memory_share must be in (0, 1), not {self.memory_share}")
