"""The engine's thread and OpenMP's: one thread's workers at a time, and a clean end of the process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from swift_core.types import ModelBundle, Request
from swift_plugin_torch import pools
from swift_plugin_torch.backend import TorchBackend
from swift_plugin_torch.config import TorchConfig, TransformersEngineConfig
from swift_plugin_torch.engine import TransformersEngine

NEVER_CLOSED = """
import sys
from pathlib import Path
from swift_core.config import load_config
from swift_core.session import Session
from swift_core.types import Request

session = Session(load_config([], [], {"model": sys.argv[1], "engine": "transformers"})).__enter__()
stream = session.opened().engine.generate([Request(token_ids=[5, 6, 7], max_tokens=400, ignore_eos=True)], stream=True)
next(stream)
print("first token")
"""

FORKED = """
import os
import torch
from swift_plugin_torch import pools

torch.set_num_threads(2)
torch.ones(1 << 18).add_(1)
child = os.fork()
if child == 0:
    pools.release()
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def threads() -> set[str]:
    return {task.name for task in Path("/proc/self/task").iterdir()}


def in_thread(work: Callable[[], None]) -> None:
    """`work` in a thread that OpenMP has not seen before."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


@pytest.fixture
def two_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def workers() -> set[str]:
    """The threads that an operation of two threads began."""
    before = threads()
    torch.ones(1 << 18).add_(1)
    return threads() - before


needs_libgomp = pytest.mark.skipif(
    not Path("/proc/self/task").exists() or not pools.found(), reason="torch computes without a libgomp of its own here"
)


@needs_libgomp
def test_workers_are_let_go_and_made_anew(two_threads: None) -> None:
    backend = TorchBackend(TorchConfig(device="cpu"))

    def work() -> None:
        first = workers()
        assert len(first) == 1
        assert not workers()  # the same again
        backend.release_threads()
        backend.release_threads()  # twice is as good
        assert not first & threads()
        assert len(workers()) == 1

    in_thread(work)


@needs_libgomp
def test_who_waits_for_the_engine_keeps_no_workers(two_threads: None, tiny_bundle: ModelBundle) -> None:
    engine = TransformersEngine(tiny_bundle, TransformersEngineConfig())

    def work() -> None:
        own = workers()
        assert len(own) == 1
        stream = engine.generate([Request(token_ids=[5, 6, 7], max_tokens=20, ignore_eos=True)], stream=True)
        next(iter(stream))
        assert not own & threads()
        assert list(stream)
        own = workers()
        engine.logprobs([[5, 6, 7]])
        assert not own & threads()

    try:
        in_thread(work)
    finally:
        engine.close()


def test_an_engine_that_is_never_closed_lets_the_process_end(tiny_folder: Path) -> None:
    words = [sys.executable, "-c", NEVER_CLOSED, str(tiny_folder)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "first token\n"), done.stderr


@needs_libgomp
def test_a_forked_process_does_not_wait_for_workers_that_it_has_not() -> None:
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "7\n", done.stderr
