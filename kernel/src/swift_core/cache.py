"""The user's cache, what is dear to make and safe to lose, and how files are known again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

WHOLE = 256 << 20  # a larger file is known by its size, its time and blocks of its content
BLOCK = 1 << 20


def cache_folder() -> Path:
    """`$SWIFT_CACHE`, else `swift-core` in the user's cache folder."""
    base = os.environ.get("SWIFT_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swift-core"


def fingerprint(files: Iterable[Path]) -> str:
    """A hash of files: their paths, for they stand in every message, and their content. To 256 MiB that is all of it, so
    that a copied or touched file is the same; beyond, size, time of change and 64 blocks spread over the file."""
    digest = hashlib.sha256()
    for path in files:
        status = path.stat()
        digest.update(f"{path.absolute()}\0{status.st_size}\0".encode())
        with path.open("rb") as file:
            if status.st_size <= WHOLE:
                while block := file.read(BLOCK):
                    digest.update(block)
                continue
            digest.update(str(status.st_mtime_ns).encode())
            for n in range(64):
                file.seek((status.st_size - BLOCK) * n // 63)
                digest.update(file.read(BLOCK))
    return digest.hexdigest()
