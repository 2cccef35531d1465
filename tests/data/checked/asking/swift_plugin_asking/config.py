from dataclasses import dataclass


@dataclass
class Config:
    """Options of a fixture."""

    path: str
