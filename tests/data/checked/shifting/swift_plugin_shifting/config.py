from dataclasses import dataclass

from swift_core.config import option


@dataclass
class Config:
    """Options of a fixture."""

    count: int = option(1, "how many rows")
