"""Megrez of Infinigence."""
