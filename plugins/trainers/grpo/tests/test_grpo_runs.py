"""Whole runs on a tiny model that is to say one letter: it learns, engine and trainer agree, resume is exact, faults told."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from swift_core.config import parse_config
from swift_core.errors import CapabilityError, RequestError, RunError, SwiftError
from swift_core.source import SampleList
from swift_core.testing import TrainerContract
from swift_core.training import train
from swift_core.types import Sample
from swift_plugin_grpo.prompts import PromptForm

LETTERS = Path(__file__).parent / "grpo_letters.py"
ROWS = [{"messages": [{"role": "user", "content": f"say e {n}"}], "letter": "e", "number": n} for n in range(16)]

Run = Callable[..., tuple[dict[str, Any], list[dict[str, Any]]]]


class TestGrpo(TrainerContract):
    distribution, id = "swift-plugin-grpo", "grpo"
    options = {"rewards": [f"{LETTERS}:letter"], "generations": 2, "max_tokens": 4, "batch_size": 1}  # noqa: RUF012

    @pytest.fixture
    def samples(self, bundle: Any) -> list[Sample]:
        return SampleList(sample for row in ROWS[:2] for sample in PromptForm().encode(bundle.template, row))


@pytest.fixture
def run(tiny_folder: Path, tmp_path: Path) -> Run:
    def run(
        name: str = "run",
        rows: list[dict[str, Any]] = ROWS,
        reward: str = "letter",
        trainer: str = "grpo",
        tuner: Any = "full",
        more: dict[str, Any] | None = None,
        **options: Any,
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        settings = {
            "name": trainer,
            "rewards": [f"{LETTERS}:{reward}"] if reward else [],
            "max_tokens": 8,
            "learning_rate": 3e-3,
        }
        summary = train(parse_config({
            "model": str(tiny_folder), "dataset": str(file), "output": str(tmp_path / name), "tuner": tuner,
            "trainer": settings | {"batch_size": 4, "max_steps": 3} | options,
            "backend": {"name": "torch", "device": "cpu"}, **(more or {}),
        }))  # fmt: skip
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        return summary, [line for line in lines if line["event"] in ("step", "table", "eval")]

    return run


def steps(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if line["event"] == "step"]


def test_it_learns_and_tells(run: Run, tmp_path: Path) -> None:
    """From 0.01 to over 0.8 in a few steps; what the log and the report have of it."""
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:4]), encoding="utf-8")
    summary, lines = run(batch_size=8, max_steps=20, learning_rate=8e-3, kl=0.001, updates=2, more={"eval_dataset": str(held)})
    own = steps(lines)
    assert own[0]["reward"] < 0.05
    assert own[-1]["reward"] > 0.8
    assert summary["reward"] == own[-1]["reward"]
    assert summary["eval_reward"] > 0.8
    assert own[0]["reward/letter"] == own[0]["reward"]
    assert summary["updates"] <= 2 * 20
    assert (own[0]["updates"], own[0]["prompts"], own[0]["answers"], own[0]["staleness"]) == (2, 8, 64, 0)
    assert own[0]["mismatch_max"] < 1e-3
    assert own[0]["entropy"] == pytest.approx(math.log(259), abs=0.1)
    assert own[-1]["entropy"] < 2
    assert own[-1]["kl"] > own[0]["kl"] >= 0
    assert sum(line["clip_high"] + line["clip_low"] for line in own) > 0
    assert {"seconds/rollouts", "seconds/rewards", "seconds/update", "seconds/sync", "seconds/log-probabilities"} <= set(own[0])
    table = [line for line in lines if line["event"] == "table"][-1]
    assert table["columns"][:3] == ["prompt", "answer", "reward"]
    assert table["rows"][0][1].count("e") >= 5
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "<h2>reward</h2>" in page
    assert "<h2>Samples, step 20</h2>" in page


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "options"),
    [
        ("dr_grpo", {}), ("dapo", {}), ("gspo", {"updates": 2}), ("cispo", {}), ("sapo", {}),
        ("rloo", {"kl": 0.001, "whiten": True}),
        ("reinforce_plus_plus", {}), ("grpo", {"advantage": "gdpo"}), ("grpo", {"ratio": "sequence_token", "updates": 2}),
        ("grpo", {"entropy_share": 0.3}), ("grpo", {"mismatch": "truncate", "loss": "bnpo"}), ("grpo", {"padding": "always"}),
        ("grpo", {"old": "engine", "updates": 2}),
    ],
)  # fmt: skip
def test_the_family_learns(trainer: str, options: dict[str, Any], run: Run) -> None:
    _, lines = run(trainer=trainer, batch_size=8, max_steps=40, learning_rate=5e-3, **options)
    assert steps(lines)[0]["reward"] < 0.05
    assert steps(lines)[-1]["reward"] > 0.6


def weights(folder: Any) -> dict[str, torch.Tensor]:
    return load_file(next(Path(folder).glob("*.safetensors"), Path(folder)))


def test_resume_is_exact(run: Run, tmp_path: Path) -> None:
    """Stopped after two of four steps and continued: the same draws, answers, losses and weights, bit for bit."""
    options = {"updates": 2, "minibatches": 2, "tuner": {"name": "lora", "rank": 4, "dropout": 0.1}, "kl": 0.01, "resample": 1}
    whole, lines = run("whole", max_steps=4, save_every=2, **options)
    run("parts", max_steps=2, **options)
    parts, again = run("parts", max_steps=4, resume=True, **options)
    figures = ("step", "loss", "reward", "grad_norm", "kl", "length", "prompts", "mismatch")
    assert [[line[name] for name in figures] for line in steps(lines)] == [[n[name] for name in figures] for n in steps(again)]
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        one, other = load_file(Path(whole["last"]) / name), load_file(Path(parts["last"]) / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(run: Run, tmp_path: Path) -> None:
    options = {"updates": 2, "minibatches": 2, "kl": 0.01, "max_steps": 4, "resample": 1, "entropy_share": 0.5}
    _, one = run("one", batch_size=4, **options)
    _, two = run("two", batch_size=2, more={"backend": {"name": "torch", "device": "cpu", "processes": 2}}, **options)
    for name in ("loss", "reward", "grad_norm", "kl", "length", "no_signal", "prompts", "answers"):
        assert [line[name] for line in steps(two)] == pytest.approx([line[name] for line in steps(one)], abs=1e-5), name


def test_padded_flat_and_shared_give_the_same_run(run: Run) -> None:
    found = [
        steps(run(name, kl=0.01, **options)[1])
        for name, options in (("flat", {}), ("padded", {"padding": "always"}), ("whole", {"share_beginning": False}))
    ]
    for name in ("loss", "kl", "grad_norm"):
        first, *others = ([line[name] for line in lines] for lines in found)
        assert all(other == pytest.approx(first, abs=1e-5) for other in others)


def test_groups_without_signal_are_drawn_anew(run: Run) -> None:
    """Rows of odd numbers never have signal: more prompts are drawn, until each of a step's four groups has it."""
    _, plain = run("plain", reward="even", max_tokens=24)
    _, anew = run("anew", reward="even", max_tokens=24, resample=6)
    assert all(line["prompts"] == 4 for line in steps(plain))
    assert sum(line["no_signal"] for line in steps(plain)) > 0
    assert sum(line["prompts"] for line in steps(anew)) > 4 * 3
    assert steps(anew)[0]["answers"] == 8 * steps(anew)[0]["prompts"]


def test_equal_rewards_change_nothing(run: Run, tmp_path: Path) -> None:
    summary, lines = run(reward="same", more={"backend": {"name": "torch", "device": "cpu"}})
    assert [(line["updates"], line["loss"], line["no_signal"]) for line in steps(lines)] == [(0, 0, 1.0)] * 3
    assert summary["updates"] == 0
    assert "nothing to learn from: no update" in steps(lines)[0]["told"]


@pytest.mark.parametrize(
    ("options", "told"),
    {
        "none": ({"reward": ""}, r"trainer\.rewards is missing"),
        "broken": ({"reward": "broken"}, "KeyError: 'solution'"),
        "few": ({"reward": "few"}, "1 scores for 32 answers"),
        "not a number": ({"reward": "nothing"}, "must be a finite number"),
        "hanging": ({"reward": "hangs", "timeouts": {"rewards": 0.3}}, r"stage rewards has not ended in 0\.3 s"),
        "no function": ({"reward": "nobody"}, "no function 'nobody'"),
        "no world": ({"environment": f"{LETTERS}:Nobody"}, "has no 'Nobody'"),
        "hanging world": (
            {"environment": f"{LETTERS}:Stuck", "reward": "", "timeouts": {"environment": 0.3}},
            "stage environment .step of prompt",
        ),
        "faulty world": ({"environment": f"{LETTERS}:Faulty"}, "no such move"),
        "one of itself": ({"ahead": True}, "one in another process"),
    }.values(),
)  # fmt: skip
def test_faults_are_told(options: dict[str, Any], told: str, run: Run) -> None:
    with pytest.raises(SwiftError, match=told) as caught:
        run(**options)
    assert isinstance(caught.value, RunError | RequestError | CapabilityError)


def test_talks_are_trained_on(run: Run) -> None:
    """The environment's reward alone; what it says is no part of the loss."""
    _, lines = run(environment=f"{LETTERS}:Guess", reward="", max_tokens=30, turns=3, stop=["e", "t", "a"])
    first = steps(lines)[0]
    assert 1 < first["turns"] <= 3
    assert first["reward/environment"] == first["reward"] > 0
    assert first["mismatch_max"] < 1e-3  # the trainer reads the talk as the engine did
    table = next(line for line in lines if line["event"] == "table")
    assert "user: begin" in table["rows"][0][1]


def test_good_answers_are_learnt_beside(run: Run) -> None:
    """CHORD: rows end with an answer, rewards say nothing, and the loss is that answer's alone; it falls."""
    rows = [{**row, "messages": [*row["messages"], {"role": "assistant", "content": "sure"}]} for row in ROWS]
    _, lines = run(rows=rows, reward="same", sft=1.0, max_steps=12, batch_size=8, learning_rate=5e-3)
    assert steps(lines)[0]["loss"] == pytest.approx(math.log(259), abs=0.2)
    assert steps(lines)[-1]["loss"] < 3.5
    _, mixed = run("mixed", rows=rows, sft=0.5, sft_end=0.1, sft_decay=2, sft_phi=True)
    assert all(math.isfinite(line["loss"]) for line in steps(mixed))


def test_long_answers_cost(run: Run) -> None:
    _, lines = run(overlong_margin=4, overlong="filter")
    first = steps(lines)[0]
    assert first["reward/overlong"] < -0.8
    assert first["reward"] == pytest.approx(first["reward/letter"] + first["reward/overlong"], abs=1e-6)
    assert first["truncated"] > 0.8
