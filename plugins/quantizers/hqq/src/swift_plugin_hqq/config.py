"""Options of the quantizer `hqq`. Torch-free."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from swift_core.config import option


@dataclass
class HqqConfig:
    """`quantizer: {name: hqq, bits: 4, group_size: 64}`. A folder that is quantized already keeps its own settings."""

    bits: Literal[8, 4, 3, 2] = option(4, "bits of a weight")
    group_size: int = option(64, "weights that share a scale and a zero point; 0: a whole row (axis 1) or column (axis 0)")
    axis: Literal[0, 1] = option(1, "groups run along a layer's inputs (1) or its outputs (0)")
    skip: list[str] = option(["lm_head"], "linear layers left as they are: names or parts of names, * stands for anything")
    device: str = option("auto", "where to quantize and keep the model: auto, cpu, cuda or cuda:N")
    shard_size: str = option("5GB", "largest weight file that is written")

    def __post_init__(self) -> None:
        if self.group_size < 0 or self.group_size % 8:
            raise ValueError(f"group_size must be 0 or a multiple of 8, not {self.group_size}")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"device must be auto, cpu, cuda or cuda:N, not {self.device!r}")
        if not re.fullmatch(r"\d+(KB|MB|GB)", self.shard_size):
            raise ValueError(f"shard_size must be a number with KB, MB or GB, such as 5GB, not {self.shard_size!r}")
