"""Options of the tuner `full`. Torch-free."""

from __future__ import annotations

import re
from dataclasses import dataclass

from swift_core.config import option


@dataclass
class FullConfig:
    """`tuner: {name: full, only: ["re:layers\\.2[0-9]\\."]}`. Without options every weight is trained."""

    only: list[str] = option([], "parameters trained: beginnings of names, or re:PATTERN; empty is all")
    parts: list[str] = option([], "parts trained: language, vision, audio, projector, embeddings, head, experts; empty is all")
    share: float = option(1.0, "share of the weights trained, counted from the output end of the model backwards")

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, not {self.share}")
        for pattern in self.only:
            if pattern.startswith("re:"):
                try:
                    re.compile(pattern[3:])
                except re.error as err:
                    raise ValueError(f"only: {pattern[3:]!r} is not a regular expression: {err}") from None
