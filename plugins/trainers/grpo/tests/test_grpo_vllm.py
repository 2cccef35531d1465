"""Rollouts by vLLM in a process of its own: the tiny model learns with adapters, with whole weights, and one step ahead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from swift_core.config import parse_config
from swift_core.training import train
from swift_plugin_transformers.testing import save_tiny

LETTERS = Path(__file__).parent / "grpo_letters.py"
ROWS = [{"messages": [{"role": "user", "content": f"say e {n}"}], "letter": "e", "number": n} for n in range(16)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With heads of a size that vLLM's attention takes."""
    environments = pytest.importorskip("swift_plugin_openai.environments")
    pytest.importorskip("swift_plugin_vllm")
    if environments.mark_of("vllm") is None:
        pytest.skip("vLLM's environment is not there: swift-core backends install vllm")
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", hidden_size=128, intermediate_size=256)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tuner", "options", "least"),
    [  # an adapter beside embeddings of random numbers can do little: ten times as often as by chance
        ({"name": "lora", "rank": 32, "alpha": 64}, {"learning_rate": 2e-2}, 0.03),
        ("full", {}, 0.8),
        ("full", {"ahead": True}, 0.8),
    ],
    ids=["adapters", "whole weights", "ahead"],
)
def test_it_learns_from_anothers_rollouts(
    tuner: Any, options: dict[str, Any], least: float, model: Path, tmp_path: Path
) -> None:
    """Engine and trainer agree to 1e-3 before the first update, and still after many; each step's rollouts are of its own
    weights, or one step older."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    settings = {"rewards": [f"{LETTERS}:letter"], "max_tokens": 8, "learning_rate": 5e-3, "batch_size": 8, "max_steps": 40}
    train(parse_config({
        "model": str(model), "dataset": str(rows), "output": str(tmp_path / "run"), "tuner": tuner,
        "trainer": {"name": "grpo", **settings, **options}, "backend": {"name": "torch", "device": "cpu", "threads": 1},
        "engine": {"name": "vllm", "dtype": "float32", "threads": 1, "max_length": 256},
    }))  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    own = [line for line in lines if line["event"] == "step"]
    assert own[0]["mismatch_max"] < 1e-3
    assert own[0]["reward"] < 0.05
    assert sum(line["reward"] for line in own[-5:]) / 5 > least
    ahead = "ahead" in options
    assert [line["staleness"] for line in own] == [0] + [int(ahead)] * 39
    if not ahead:
        assert max(line["mismatch_max"] for line in own if "mismatch_max" in line) < 5e-3
