"""Options of the trainers `classify`, `tag`, `embed`, `rerank`, `reward` and `prm`. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from swift_core.config import option
from swift_plugin_supervised.config import SupervisedConfig


@dataclass
class HeadsConfig(SupervisedConfig):
    """`trainer: {name: classify, epochs: 3}`. What a longer text loses is template.max_length's business."""

    overflow: Literal["drop"] = option(
        "drop", "what becomes of a sample above max_length: texts are cut by template.max_length"
    )
    packing: bool = option(False, "not to be had: a sample with a head has a place of its own")
    padding: Literal["auto", "always"] = option(
        "auto",
        "auto lays texts that are judged by their last token (classify, rerank, reward) end to end, isolated from each other, "
        "where the model allows; always pads",
    )
    share_beginning: bool = option(True, "compute once what all texts of a sample begin with, where the model allows")

    def __post_init__(self) -> None:
        if self.packing:
            raise ValueError("packing is not to be had with a head: batch_tokens fills passes")
        super().__post_init__()


@dataclass
class EmbedConfig(HeadsConfig):
    """`trainer: {name: embed, temperature: 0.05}`."""

    loss: Literal["auto", "infonce", "cosent"] = option(
        "auto", "infonce for rows with a positive, cosent for pairs with a label; auto is what the rows have"
    )
    temperature: float = option(0.05, "what cosines are divided by")
    in_batch: bool = option(True, "the other rows' documents of a pass count as negatives")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature}")


@dataclass
class RewardConfig(HeadsConfig):
    """`trainer: {name: reward, center: 0.01}`."""

    center: float | None = option(None, "weight of the square of a pair's summed scores, which holds them around 0")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.center is not None and self.center < 0:
            raise ValueError(f"center must be at least 0 or null, not {self.center}")
