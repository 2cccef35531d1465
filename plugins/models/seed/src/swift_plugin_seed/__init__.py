"""Seed-OSS, UI-TARS, SAIL-VL2 and Valley of ByteDance."""
