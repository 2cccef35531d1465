"""Whole runs on a tiny model that is to say one letter: it learns, values tell returns, resume is exact, faults are told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from swift_core.config import parse_config
from swift_core.errors import RequestError
from swift_core.source import SampleList
from swift_core.testing import TrainerContract
from swift_core.training import train
from swift_core.types import Sample
from swift_plugin_grpo.prompts import PromptForm

LETTERS = Path(__file__).parent / "ppo_letters.py"
ROWS = [{"messages": [{"role": "user", "content": f"say e {n}"}], "letter": "e"} for n in range(16)]

Run = Callable[..., tuple[dict[str, Any], list[dict[str, Any]]]]


class TestPpo(TrainerContract):
    distribution, id = "swift-plugin-ppo", "ppo"
    options: ClassVar[Any] = {"rewards": [f"{LETTERS}:letter"], "max_tokens": 4, "batch_size": 1, "kl": 0.0}

    @pytest.fixture
    def samples(self, bundle: Any) -> list[Sample]:
        return SampleList(sample for row in ROWS[:2] for sample in PromptForm().encode(bundle.template, row))


@pytest.fixture
def run(tiny_folder: Path, tmp_path: Path) -> Run:
    def run(name: str = "run", tuner: Any = "full", more: Any = None, **options: Any) -> tuple[dict[str, Any], list[Any]]:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
        settings = {"name": "ppo", "rewards": [f"{LETTERS}:letter"], "max_tokens": 8, "learning_rate": 3e-3}
        summary = train(parse_config({
            "model": str(tiny_folder), "dataset": str(file), "output": str(tmp_path / name), "tuner": tuner,
            "trainer": settings | {"batch_size": 4, "max_steps": 3, "kl": 0.0} | options,
            "backend": {"name": "torch", "device": "cpu"}, **(more or {}),
        }))  # fmt: skip
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        return summary, [line for line in lines if line["event"] == "step"]

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(
        next(Path(folder).glob("*.safetensors"))
        if not (Path(folder) / "model.safetensors").exists()
        else Path(folder) / "model.safetensors"
    )


def test_it_learns_and_values_tell_what_is_to_come(run: Run, tmp_path: Path) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:4]), encoding="utf-8")
    summary, steps = run(batch_size=16, max_steps=40, learning_rate=5e-3, more={"eval_dataset": str(held)})
    assert steps[0]["reward"] < 0.05
    assert steps[-1]["reward"] > 0.6
    assert summary["eval_reward"] > 0.6
    assert steps[0]["mismatch_max"] < 1e-3
    assert summary["updates"] == 40 * 4
    assert max(abs(step["return"] - step["value_error"]) for step in steps[-1:]) > 0.2  # values are near the returns by now
    assert abs(steps[-1]["value_error"]) < 0.3
    assert sum(step["clipped"] for step in steps) > 0
    assert {"seconds/rollouts", "seconds/update", "seconds/rewards", "seconds/log-probabilities"} <= set(steps[0])
