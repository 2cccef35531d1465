"""The metric `length`: the shorter of two texts over the longer, in characters."""

from __future__ import annotations


def length(prediction: str, reference: str) -> float:
    """A score in [0, 1]; 1 for texts of the same length, two empty ones included."""
    longer = max(len(prediction), len(reference))
    return min(len(prediction), len(reference)) / longer if longer else 1.0
