"""LFM2 and LFM3 of Liquid AI."""
