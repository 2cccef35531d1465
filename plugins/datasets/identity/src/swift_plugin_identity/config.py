"""Options of the data set `identity`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from swift_core.config import option


@dataclass(frozen=True)
class IdentityConfig:
    """Who the model is to be. Raises ValueError for an empty name."""

    assistant: str = option("Kestrel", "the name that the model learns to answer to")
    author: str = option("the Swift Core team", "who made it, as it stands in a sentence: made by ...")
    split: Literal["train", "eval", "identity", "ordinary"] = option(
        "train", "train; eval: the held-out rows; identity, ordinary: the held-out rows of one kind"
    )

    def __post_init__(self) -> None:
        for name in ("assistant", "author"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name}: expected a name")
