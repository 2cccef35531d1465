from dataclasses import dataclass


@dataclass
class Config:
    """Options of a fixture."""

    count: int = 1
