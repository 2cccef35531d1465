"""Grok-1, as converted by hpcai-tech."""
