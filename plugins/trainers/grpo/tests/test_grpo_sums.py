"""The example sums: the embedded model learns short right answers by rewards, by several algorithms and with two engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from swift_core.config import load_config
from swift_core.training import train

ROOT = Path(__file__).parents[4]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "engine"),
    [*((name, "transformers") for name in ("grpo", "dr_grpo", "rloo", "cispo")), ("grpo", "vllm")],
)  # fmt: skip
def test_sums_are_learned(trainer: str, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From under 0.3 to over 0.8 in mean reward, the mean of the last five steps."""
    flags: dict[str, Any] = {"output": str(tmp_path / "run"), "engine": engine}
    if engine == "vllm":
        environments = pytest.importorskip("swift_plugin_openai.environments")
        if environments.mark_of("vllm") is None:
            pytest.skip("vLLM's environment is not there: swift-core backends install vllm")
    monkeypatch.chdir(ROOT)  # the example's paths begin there
    more = ["engine.dtype=float32", "engine.threads=1", "engine.max_length=256"] if engine == "vllm" else []
    options = [f"trainer.name={trainer}", *(["trainer.kl=0.001"] if trainer == "rloo" else []), *more]
    train(load_config([Path("examples/sums/sums.yaml")], options, flags))
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line["event"] == "step"]
    assert steps[0]["reward"] < 0.3
    assert sum(line["reward"] for line in steps[-5:]) / 5 > 0.8
    assert steps[0]["mismatch_max"] < 1e-3
