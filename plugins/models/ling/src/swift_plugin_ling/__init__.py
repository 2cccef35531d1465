"""Ling and Ring of inclusionAI."""
