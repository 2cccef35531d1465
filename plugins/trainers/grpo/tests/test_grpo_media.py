"""Prompts with pictures and sounds: engine and trainer read the same, the answers' tokens stand behind them as drawn."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from swift_core.config import parse_config
from swift_core.errors import RequestError, RunError
from swift_core.training import train
from swift_core.types import Completion
from swift_plugin_grpo.prompts import Prompt
from swift_plugin_grpo.rollouts import check_prompt

sys.path.insert(0, str(Path(__file__).parents[3] / "models" / "transformers" / "tests"))
import media_models

LETTERS = Path(__file__).parent / "grpo_letters.py"


def run(name: str, folder: Path, steps: int, tuner: str = "lora", **options: Any) -> list[dict[str, Any]]:
    tiny = media_models.MODELS[name]()
    for holder in (tiny.model, tiny.processor):
        holder.save_pretrained(folder / "model")
    rows = []
    for n in range(6):  # every third row is text alone
        shown = []
        if n % 3:
            file = folder / f"{n}.{'wav' if tiny.kind == 'audio' else 'png'}"
            if tiny.kind == "audio":
                import soundfile

                soundfile.write(file, media_models.sound(n)["array"], 16000)
            else:
                media_models.picture(n, (16, 16) if name == "llava" else (40, 24)).save(file)
            shown = [str(file)]
        parts = [*({"type": tiny.kind} for _ in shown), {"type": "text", "text": f"say e {n}"}]
        rows.append({"messages": [{"role": "user", "content": parts}], f"{tiny.kind}s": shown})
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {"rewards": [f"{LETTERS}:seen"], "max_tokens": 8, "learning_rate": 3e-3, "batch_size": 3, "max_steps": steps}
    train(parse_config({
        "model": str(folder / "model"), "dataset": str(file), "output": str(folder / "run"), "tuner": tuner,
        "trainer": {"name": "grpo", "generations": 4, **settings, **options}, "backend": {"name": "torch", "device": "cpu"},
    }))  # fmt: skip
    lines = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["event"] == "step"]


@pytest.mark.parametrize("padding", ["auto", "always"])
@pytest.mark.parametrize("name", ["llava", "qwen", "idefics", "audio"])
def test_engine_and_trainer_read_the_same(name: str, padding: str, tmp_path: Path) -> None:
    """Their log-probabilities agree before any update, and after one."""
    lines = run(name, tmp_path, 3, padding=padding, temperature=1.3)
    assert max(line["mismatch_max"] for line in lines) < 1e-3
    assert lines[0]["grad_norm"] > 0


def test_it_learns(tmp_path: Path) -> None:
    lines = run("llava", tmp_path, 30, "full", learning_rate=1e-2, generations=8)
    assert lines[0]["reward"] < 0.5
    assert lines[-1]["reward"] > 0.9


def test_talks_take_text_only(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="talks take text only so far, and the prompts have media"):
        run("llava", tmp_path, 1, environment=f"{LETTERS}:Guess")


def test_other_tokens_than_the_trainers_are_told() -> None:
    prompt = Prompt(3, [1, 2, 3], {}, "<image>", {"images": ["a.png"]})
    check_prompt(prompt, Completion(0, "", prompt_tokens=3))
    with pytest.raises(RunError, match="the engine read 2 tokens of prompt 3, and the trainer reads 3"):
        check_prompt(prompt, Completion(0, "", prompt_tokens=2))
