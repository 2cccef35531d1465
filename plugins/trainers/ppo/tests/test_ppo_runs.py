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
    """Of all safetensors of a checkpoint but the generators', by file and name."""
    files = [file for file in sorted(folder.rglob("*.safetensors")) if not file.name.startswith("random")]
    return {f"{file.relative_to(folder)}:{name}": value for file in files for name, value in load_file(file).items()}


@pytest.mark.slow
def test_it_learns_and_values_tell_what_is_to_come(run: Run, tmp_path: Path) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:4]), encoding="utf-8")
    summary, steps = run(batch_size=16, max_steps=30, learning_rate=5e-3, more={"eval_dataset": str(held)})
    assert steps[0]["reward"] < 0.05
    assert steps[-1]["reward"] > 0.8
    assert summary["eval_reward"] > 0.8
    assert summary["updates"] == 30 * 4
    assert summary["train_loss"] == pytest.approx(sum(step["loss"] for step in steps) / 30)
    assert steps[0]["mismatch_max"] < 1e-3
    assert steps[-1]["return"] > 0.8
    assert abs(steps[-1]["value_error"]) < 0.3
    assert sum(step["clipped"] for step in steps) > 0
    assert {"seconds/rollouts", "seconds/update", "seconds/rewards", "seconds/log-probabilities"} <= set(steps[0])


def test_resume_is_exact(run: Run, tmp_path: Path) -> None:
    """Stopped after two of four steps and continued: both models and both optimizers are the same bit for bit."""
    options = {
        "max_steps": 4, "save_every": 2, "keep": 0, "updates": 2, "minibatches": 2, "kl": 0.02,
        "tuner": {"name": "lora", "rank": 4},
    }  # fmt: skip
    straight, one = run("straight", **options)
    again, two = run("again", **options, resume=str(tmp_path / "straight" / "checkpoints" / "step-2"))
    mine, other = (weights(Path(summary["last"])) for summary in (straight, again))
    assert mine.keys() == other.keys()
    assert {name.split(":")[0] for name in mine} >= {
        "adapter_model.safetensors", "optimizer.safetensors", "value/adapter_model.safetensors", "value/optimizer.safetensors",
    }  # fmt: skip
    for name, value in mine.items():
        assert torch.equal(value, other[name]), name
    for name in ("reward", "loss", "value_loss", "kl"):
        assert [step[name] for step in two] == [step[name] for step in one[2:]]
    assert one[0]["kl"] == pytest.approx(0, abs=1e-6)  # the adapter is new
    assert abs(one[-1]["kl"]) > 1e-6


def test_the_value_model_is_warmed_up_alone(run: Run, tiny_folder: Path) -> None:
    summary, steps = run(max_steps=2, value_warmup=2, updates=3, learning_rate=1e-2)
    policy, before = (load_file(Path(folder) / "model.safetensors") for folder in (summary["last"], tiny_folder))
    assert all(torch.equal(value, before[name]) for name, value in policy.items())
    assert steps[0]["loss"] == 0
    value = load_file(Path(summary["last"]) / "value" / "model.safetensors")
    assert not torch.equal(value["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert value["score.weight"].shape == (1, 64)


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_a_value_model_may_be_named_and_must_give_one_number(tuner: str, run: Run, tiny_folder: Path) -> None:
    """One that was trained to warm values begins with them."""
    first, warmed = run("first", tuner, max_steps=6, value_warmup=6, learning_rate=5e-3)
    folder = Path(first["last"]) / "value"
    _, steps = run("second", tuner, max_steps=1, more={"models": {"value": str(folder)}})
    assert steps[0]["value_loss"] < 0.5 * warmed[0]["value_loss"]
    with pytest.raises(RequestError, match=r"models\.value: its head gives 3 numbers"):
        run("third", max_steps=1, more={"models": {"value": {"name": str(tiny_folder), "num_labels": 3}}})
    with pytest.raises(RequestError, match=r"models\.value: its head for reward says a number of a whole text"):
        run("fourth", max_steps=1, more={"models": {"value": {"name": str(tiny_folder), "task": "reward"}}})


def test_a_policy_that_cannot_write_is_refused(run: Run, tiny_folder: Path) -> None:
    with pytest.raises(RequestError, match="is a model with a head for reward, and answers need one that writes"):
        run("run", max_steps=1, kl=0, more={"model": {"name": str(tiny_folder), "task": "reward"}})


def test_a_run_from_another_one_is_told_its_reference(run: Run, tmp_path: Path) -> None:
    first, _ = run("first", "lora", max_steps=1, kl=0.1)
    run("run", "lora", max_steps=1, kl=0.1, more={"from": first["last"]})
    told = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert any("the reference is the model without the weights" in line.get("text", "") for line in told)


def test_a_reference_that_nothing_reads_is_told(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    run("run", max_steps=1, kl=0, more={"models": {"reference": str(tiny_folder)}})
    told = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert any("models.reference is not used: trainer.kl is 0" in line.get("text", "") for line in told)


def test_wrong_requests(run: Run) -> None:
    with pytest.raises(RequestError, match=r"trainer\.rewards is missing"):
        run(rewards=[])
    with pytest.raises(RequestError, match="gamma must be between 0 and 1"):
        run(gamma=2)


@pytest.mark.slow
def test_answers_laid_end_to_end_equal_padded_ones(run: Run) -> None:
    found = [run(name, padding=name, max_steps=3, generations=2)[1] for name in ("auto", "always")]
    for name in ("reward", "loss", "value_loss", "explained"):
        assert [step[name] for step in found[0]] == pytest.approx([step[name] for step in found[1]], rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_two_processes_equal_one(run: Run) -> None:
    found = []
    for processes, size in ((1, 4), (2, 2)):
        backend = {"name": "torch", "device": "cpu", "processes": processes}
        found.append(run(f"run{processes}", batch_size=size, minibatches=2, kl=0.05, more={"backend": backend})[1])
    for name in ("reward", "loss", "value_loss", "explained", "kl", "clipped", "length"):
        one, two = ([step[name] for step in steps] for steps in found)
        assert two == pytest.approx(one, rel=1e-3, abs=1e-5), name


@pytest.mark.slow
def test_a_reward_model_scores_in_every_process(run: Run, tmp_path: Path) -> None:
    """A model of the transformers library with a head of one number, opened anew in each rank."""
    from swift_plugin_transformers.testing import make_tokenizer
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = make_tokenizer()
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2}
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**shape, **tokens, num_key_value_heads=2, num_labels=1))
    model.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    found = []
    for processes, size in ((1, 4), (2, 2)):
        backend = {"name": "torch", "device": "cpu", "processes": processes}
        rewards = [{"name": str(tmp_path / "judge"), "label": "judge"}, {"name": "length", "max": 4, "weight": 0.1}]
        options = {"batch_size": size, "max_steps": 2, "rewards": rewards}
        found.append(run(f"run{processes}", **options, more={"backend": backend})[1])
    for name in ("reward", "reward/judge", "reward/length", "reward_std/judge"):
        one, two = ([step[name] for step in steps] for steps in found)
        assert two == pytest.approx(one, rel=1e-3, abs=1e-5), name
    assert found[0][0]["reward_std/judge"] > 0
