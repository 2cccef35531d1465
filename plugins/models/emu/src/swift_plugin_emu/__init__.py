"""Emu3 of BAAI."""
