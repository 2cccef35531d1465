"""Kimi and Moonlight of Moonshot AI."""
