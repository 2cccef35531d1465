"""The small classics, as data: manifest and checkpoints."""
