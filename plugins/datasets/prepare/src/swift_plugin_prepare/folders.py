"""Folders of a cache, whole or not there. Work goes on in a hidden one that is renamed when it is done; one whose process died
is removed by the next `prune`.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from swift_core.errors import RequestError

KEPT_BYTES, KEPT_FOLDERS = 20 << 30, 200


@contextmanager
def working_folder(parent: Path) -> Iterator[Path]:
    """A new hidden folder in `parent`, removed at the end where it still has its name. Raises RequestError."""
    folder = parent / f".{os.uname().nodename}-{os.getpid()}-{time.monotonic_ns():x}"
    try:
        folder.mkdir(parents=True)
    except OSError as err:
        raise RequestError(f"cache {parent} cannot be written to: {err.strerror}; SWIFT_CACHE names another place") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def prune(parent: Path, keep: Path | None = None) -> None:
    """Remove the folders longest unused beyond 20 GiB or 200 of them, never `keep`, and those of processes that died."""
    for hidden in parent.glob(f".{os.uname().nodename}-*-*"):  # another machine may share the folder
        if not _alive(hidden.name.rsplit("-", 2)[1]):
            shutil.rmtree(hidden, ignore_errors=True)
    found = []
    for folder in parent.glob("[!.]*"):
        with suppress(OSError):  # another process may be removing it
            found.append((folder.stat().st_mtime, sum(file.stat().st_size for file in folder.iterdir()), folder))
    total = 0
    for number, (_, size, folder) in enumerate(sorted(found, reverse=True)):
        total += size
        if folder != keep and (total > KEPT_BYTES or number >= KEPT_FOLDERS):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except OSError:
        pass
    return True
