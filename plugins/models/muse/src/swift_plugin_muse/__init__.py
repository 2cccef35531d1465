"""Muse Glimmer and Muse Spark of Meta."""
