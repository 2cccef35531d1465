"""The workers that OpenMP keeps for each thread that computed on a CPU.

GNU's OpenMP, which torch's wheels bring, lets workers wait awake for the next operation as long as those of all threads are
together no more than the cores. Beyond that they go to sleep after each, and a decode step takes half as long again. A thread's
workers stay as long as it does: one that has loaded a model and now waits for another that runs it had better let them go.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

SOFT = 1  # omp_pause_soft: what the program has set stays
STARTED = os.getpid()


def release() -> None:
    """End the calling thread's workers. They are made anew, in microseconds, when it computes again. In a forked process this
    does nothing: workers from before the fork are not there, and would be waited for."""
    pause = _pause()
    if pause is not None and os.getpid() == STARTED:
        pause(SOFT)


def found() -> bool:
    """Whether torch brings a libgomp. With another OpenMP `release` does nothing."""
    return _pause() is not None


@cache
def _pause() -> Callable[[int], int] | None:
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        try:
            return ctypes.CDLL(str(path)).omp_pause_resource_all  # type: ignore[no-any-return]
        except (OSError, AttributeError):
            continue
    return None
