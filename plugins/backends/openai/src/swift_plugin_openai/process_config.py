"""Options that all engines with a process of their own share."""

from __future__ import annotations

from dataclasses import dataclass

from swift_core.config import option


@dataclass(frozen=True)
class ProcessConfig:
    """Raises ValueError for a number out of range."""

    python: str | None = option(
        None, "interpreter that has the library; without it the one that `swift-core backends install` made"
    )
    start_timeout: float = option(300.0, "seconds that the process may take until it answers")
    timeout: float = option(600.0, "seconds without a byte after which an answer is given up")
    concurrent: int = option(256, "requests sent at a time; the process queues and batches them")
    threads: int | None = option(None, "threads of the process; without it the library's choice")

    def __post_init__(self) -> None:
        for name in ("start_timeout", "timeout"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0 seconds, not {getattr(self, name)}")
        for name in ("concurrent", "threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
