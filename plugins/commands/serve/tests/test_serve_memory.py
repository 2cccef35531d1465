"""Memory of a process that starts a thread for every request: its allocator has few pools, and gives back what is free."""

from __future__ import annotations

import asyncio
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


FREED = """
    import ctypes
    from pathlib import Path
    from swift_plugin_serve.memory import trim
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

    pieces = [libc.malloc(32 << 10) for _ in range(4096)]  # 128 MiB, from the heap
    for piece in pieces:
        ctypes.memset(piece, 1, 32 << 10)
    full = resident()
    for n, piece in enumerate(pieces):
        if n % 8:  # every eighth stays, and holds the heap's end where it is
            libc.free(piece)
    freed = resident()
    trim()
    print(full - freed, freed - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_what_is_free_is_given_back() -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FREED)], capture_output=True, text=True, timeout=60, check=True
    )
    alone, trimmed = map(float, done.stdout.split())
    assert alone < 20, "freeing gives it back by itself: there is no need of trim"
    assert trimmed > 80


def test_a_server_trims_as_time_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from swift_plugin_serve import memory, run

    calls: list[int] = []
    monkeypatch.setattr(run, "trim", lambda: calls.append(1))

    async def ticks() -> None:
        server = run.Server(run.uvicorn.Config("none:none", lifespan="off"), None)  # type: ignore[arg-type]
        for counter in range(1, 20 * memory.EVERY + 1):
            assert not await server.on_tick(counter)
        await asyncio.sleep(0.2)

    asyncio.run(ticks())
    assert len(calls) == 2
