"""How glibc's allocator behaves in a process that starts a thread for every request, and keeps states of many sizes."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress

M_ARENA_MAX = -8  # of glibc's malloc.h
ARENAS = 2
EVERY = 15  # seconds between two calls of `trim`


def few_arenas() -> None:
    """Let all threads allocate from two pools. glibc makes up to eight for each core, what one pool has freed serves no other,
    and the process grows for many minutes. What the user has set stands; elsewhere nothing is done."""
    if sys.platform == "linux" and not os.environ.get("MALLOC_ARENA_MAX"):
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").mallopt(M_ARENA_MAX, ARENAS)


def trim() -> None:
    """Give free pages back to the system: answers come and go among states that stay, and what they leave free lies between
    them, where glibc keeps it. Takes a few milliseconds; elsewhere nothing is done."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
