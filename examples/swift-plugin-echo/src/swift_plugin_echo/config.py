"""Options of the engine `echo`. The kernel imports this module to check a configuration: no heavy library here."""

from __future__ import annotations

from dataclasses import dataclass

from swift_core.config import option


@dataclass(frozen=True)
class EchoConfig:
    """`engine: {name: echo, upper: true}`. Raises ValueError for a negative delay."""

    upper: bool = option(False, "answer in capital letters")
    delay: float = option(0.0, "seconds between two pieces of a streamed answer")

    def __post_init__(self) -> None:
        if self.delay < 0:
            raise ValueError(f"delay must be at least 0 seconds, not {self.delay}")
