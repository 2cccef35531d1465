"""Orion of OrionStar."""
