"""Keye-VL of Kuaishou."""
