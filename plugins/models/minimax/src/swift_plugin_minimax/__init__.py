"""MiniMax: Text-01, VL-01, M1, M2 and M3."""
