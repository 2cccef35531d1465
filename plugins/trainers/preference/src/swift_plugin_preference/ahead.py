"""Log-probabilities of the reference, computed once before training and kept in the run's folder.

Files of rows (key, values): the key is a hash of what was computed on, so that order, epochs and processes do not matter, and
a run that was killed goes on from what is there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from swift_core.types import Sample

KEY = 16  # bytes of a hash
FLUSH = 64  # groups that a file holds at least


def key_of(group: Sequence[Sample]) -> bytes:
    """A hash of the samples' tokens, weights and media."""
    digest = hashlib.blake2b(digest_size=KEY)
    for sample in group:
        digest.update(json.dumps([sample.input_ids, sample.weights, sample.media], default=str).encode())
    return digest.digest()


class Kept:
    """Log-probabilities by key. settings: what they depend on beside the samples; files of other settings are not read."""

    def __init__(self, folder: Path, settings: Sequence[object]) -> None:
        self.folder, self.name = folder, hashlib.blake2b(json.dumps(list(settings)).encode(), digest_size=6).hexdigest()
        self.values: dict[bytes, list[float]] = {}

    def read(self) -> None:
        """All that any rank has written. A file that cannot be read is passed over: its rows are made again."""
        for file in sorted(self.folder.glob(f"{self.name}-*.safetensors")):
            try:
                found = load_file(file)
            except (OSError, SafetensorError):
                continue
            keys = [bytes(key) for key in found["keys"].tolist()]
            self.values |= dict(zip(keys, found["values"].tolist(), strict=True))

    def fill(self, batches: Iterable[tuple[list[bytes], Callable[[], torch.Tensor]]], rank: int) -> None:
        """Compute and write what is missing. batches: the keys of some groups, and what computes their values: [groups, samples
        of a group]."""
        fresh: dict[bytes, list[float]] = {}
        for keys, compute in batches:
            if all(key in self.values for key in keys):
                continue
            found = dict(zip(keys, compute().tolist(), strict=True))
            self.values |= found
            fresh |= found
            if len(fresh) >= FLUSH:
                self._write(fresh, rank)
                fresh = {}
        if fresh:
            self._write(fresh, rank)

    def get(self, keys: Sequence[bytes]) -> torch.Tensor:
        """[groups, samples of a group] float32. KeyError for one that is not there."""
        return torch.tensor([self.values[key] for key in keys], dtype=torch.float32)

    def _write(self, rows: dict[bytes, list[float]], rank: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        number = len(list(self.folder.glob(f"{self.name}-{rank}-*.safetensors")))
        file = self.folder / f"{self.name}-{rank}-{number:05d}.safetensors"
        tensors = {
            "keys": torch.tensor([list(key) for key in rows], dtype=torch.uint8),
            "values": torch.tensor(list(rows.values()), dtype=torch.float32),
        }
        save_file(tensors, file.with_suffix(".part"))
        file.with_suffix(".part").rename(file)
