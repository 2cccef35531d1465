"""Memory of a process that starts a thread for every request: its allocator has few pools."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

SCRIPT = """
    import ctypes, sys, threading
    if sys.argv[1] == "few":
        from swift_plugin_serve.memory import few_arenas
        few_arenas()
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
    here, go = threading.Barrier(13), threading.Event()

    def work():
        kept = libc.malloc(1 << 12)
        here.wait()
        go.wait()
        libc.free(kept)

    threads = [threading.Thread(target=work) for _ in range(12)]
    for thread in threads:
        thread.start()
    here.wait()
    libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
    libc.fflush(None)
    go.set()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core has few pools anyway")
def test_threads_share_two_pools() -> None:
    env = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    pools = {}
    for how, more in (("few", {}), ("as it is", {}), ("few", {"MALLOC_ARENA_MAX": "5"})):
        command = [sys.executable, "-c", textwrap.dedent(SCRIPT), how]
        done = subprocess.run(command, env=env | more, capture_output=True, text=True, timeout=60, check=True)
        pools[how, bool(more)] = done.stdout.count("<heap nr=")
    assert pools["few", False] == 2
    assert pools["as it is", False] > 5
    assert pools["few", True] == 5, "what the user has set does not stand"
