"""Fixtures of the end-to-end tests: a tiny model, a small data file, warm forks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # support.py, here and in the processes that tests start

from support import Forks, environment, sums, write_rows


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jsonl file of 13 conversations."""
    return write_rows(tmp_path_factory.mktemp("rows") / "sums.jsonl", sums(1, 13))


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Forks:
    """Starts commands in warm processes."""
    made = Forks(tmp_path_factory.mktemp("forks"))
    with environment(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false"):
        made.run("--version").ok()
    return made
