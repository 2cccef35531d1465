"""Options of the tuner `lora`. Torch-free."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from swift_core.config import option


@dataclass
class LoraConfig:
    """`tuner: {name: lora, rank: 16}`. The update of a weight is (alpha / rank) B A (Hu et al. 2021, section 4.1)."""

    rank: int = option(8, "rank of the update; higher learns more and takes more memory")
    alpha: float = option(16.0, "scale: the update is multiplied by alpha / rank")
    dropout: float = option(0.0, "dropout on the adapter's input")
    targets: list[str] = option(["all-linear"], "layers: all-linear, names, name endings, or one regex written re:PATTERN")
    parts: list[str] = option(
        [], "parts that get adapters: language, vision, audio, projector, ...; by default all-linear is the language model only"
    )
    exclude: list[str] = option([], "names or name endings left out of the targets")
    init: Literal["default", "gaussian", "pissa", "olora", "orthogonal"] = option(
        "default", "first values: B zero (default, gaussian); pissa and olora take them from the weight, and train its rest"
    )
    rslora: bool = option(False, "scale by alpha / sqrt(rank) (Kalajdzievski 2023)")
    dora: bool = option(False, "train each weight's magnitude apart from its direction (Liu et al. 2024)")
    plus_ratio: float = option(1.0, "LoRA+: learning rate of B over that of A (Hayou et al. 2024); 16 is usual, 1 is off")
    like: str | None = option(None, "folder of a peft LoRA adapter, whose own options are taken instead of all these")
    save_modules: list[str] = option([], "modules trained and saved whole, such as lm_head")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if self.plus_ratio <= 0:
            raise ValueError(f"plus_ratio must be above 0, not {self.plus_ratio}")
        if not self.targets:
            raise ValueError("targets is empty: nothing would be trained")
        for pattern in (entry[3:] for entry in self.targets if entry.startswith("re:")):
            if len(self.targets) > 1:
                raise ValueError("targets: a regex stands alone; join several with |")
            try:
                re.compile(pattern)
            except re.error as err:
                raise ValueError(f"targets: {pattern!r} is not a regular expression: {err}") from None
