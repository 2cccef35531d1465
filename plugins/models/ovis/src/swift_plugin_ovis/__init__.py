"""Ovis and Marco of AIDC-AI."""
