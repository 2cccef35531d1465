"""XVERSE."""
