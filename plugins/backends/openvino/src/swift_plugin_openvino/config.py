"""Options of the engine `openvino`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from swift_core.config import option
from swift_plugin_openai.process_config import ProcessConfig


@dataclass(frozen=True)
class OpenVINOConfig(ProcessConfig):
    """`engine: {name: openvino, precision: bf16}`. Raises ValueError for a number out of range."""

    precision: Literal["fp32", "bf16", "int8"] = option(
        "bf16", "of the arithmetic; int8: weights of 8 bits, arithmetic in bf16"
    )
    max_rows: int = option(64, "answers under way at a time; further ones wait")
    cache_gb: int = option(1, "key-value cache, in GiB")
    cache_precision: Literal["auto", "u8"] = option("auto", "of the key-value cache: the arithmetic's, or 8 bits, which rounds")
    logprobs: bool = option(True, "tell the log-probabilities of answers; without them an eighth more tokens a second")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_rows", "cache_gb"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
