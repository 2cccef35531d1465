"""Whole runs: what is learnt, reported and resumed, references of each kind, rows refused and cut, several processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from swift_core.config import parse_config
from swift_core.errors import RequestError
from swift_core.testing import TrainerContract
from swift_core.training import train
from swift_core.types import Sample
from swift_plugin_preference.forms import LabelledRows, PairRows
from swift_plugin_preference.testing import pair

GOOD, BAD = ["warm", "kind", "glad", "fine"], ["cold", "grim", "sour", "mean"]
DAYS = ["sea", "hill", "town", "mill"]
ROWS = [pair(f"how was the {day}", good, bad) for day in DAYS for good, bad in zip(GOOD, BAD, strict=True)]
LABELLED = [
    {"messages": row[key], "label": key == "messages"} for n, row in enumerate(ROWS) for key in ("messages", "rejected")
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def run(model: Path, rows: str, output: Path, trainer: str, held: bool = True, **more: Any) -> dict[str, Any]:
    options = {"epochs": 6, "batch_size": 4, "learning_rate": 1e-3, **more.pop("options", {})}
    return train(parse_config({
        "model": str(model), "dataset": rows, "output": str(output), "tuner": more.pop("tuner", "full"),
        "trainer": {"name": trainer, **options}, "backend": {"name": "torch", "device": "cpu", "precision": "fp32"},
        **({"eval_dataset": rows} if held else {}), **more,
    }))  # fmt: skip


def logged(output: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["event"] == kind]


def weights(output: Path) -> dict[str, torch.Tensor]:
    (last,) = {path.resolve() for path in output.glob("checkpoints/last")}
    found: dict[str, torch.Tensor] = {}
    for file in sorted(last.glob("*.safetensors")):
        found |= {f"{file.name}/{name}": value for name, value in load_file(file).items()}
    return found


# --- the contract of trainers -----------------------------------------------------------------------------------------


class PreferenceContract(TrainerContract):
    """The trainer contract, with samples of the trainer's row form."""

    distribution = "swift-plugin-preference"

    @pytest.fixture
    def samples(self, bundle: Any) -> list[Sample]:
        form: Any = LabelledRows() if self.id == "kto" else PairRows()
        return [sample for row in (LABELLED if self.id == "kto" else ROWS)[:4] for sample in form.encode(bundle.template, row)]


class TestDpo(PreferenceContract):
    id = "dpo"


class TestOrpo(PreferenceContract):
    id = "orpo"


class TestCpo(PreferenceContract):
    id = "cpo"


class TestSimpo(PreferenceContract):
    id = "simpo"


class TestKto(PreferenceContract):
    id = "kto"


# --- learning and what is told ----------------------------------------------------------------------------------------


SLOWLY = pytest.mark.slow


@pytest.mark.parametrize(
    "trainer", ["dpo", *(pytest.param(name, marks=SLOWLY) for name in ("orpo", "cpo", "simpo")), "kto"]
)  # fmt: skip
def test_a_tiny_model_learns(trainer: str, tiny_folder: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", LABELLED if trainer == "kto" else ROWS)
    options = {"batch_size": 8, "eval_every": 4, **({"beta": 1.0} if trainer == "orpo" else {})}
    summary = run(tiny_folder, rows, tmp_path / "run", trainer, options=options)
    steps, evals = logged(tmp_path / "run", "step"), logged(tmp_path / "run", "eval")
    assert evals[-1]["loss"] < evals[0]["loss"] - 0.05
    assert evals[-1]["reward_accuracy"] > 0.9
    assert evals[-1]["reward_margin"] > evals[0]["reward_margin"]
    names = {"rewards_chosen", "rewards_rejected", "reward_margin", "reward_accuracy", "logps_chosen", "logps_rejected"}
    assert names <= steps[-1].keys()
    assert names <= evals[-1].keys()
    assert summary["eval_metrics"]["reward_accuracy"] == evals[-1]["reward_accuracy"]
    assert summary["train_metrics"]["reward_margin"] == steps[-1]["reward_margin"]
    assert steps[0]["logps_chosen"] < -5  # of a whole answer
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "<h2>reward_margin</h2>\n<svg" in report


@pytest.mark.slow
def test_a_new_adapter_begins_at_its_reference(tiny_folder: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", ROWS)
    summary = run(
        tiny_folder, rows, tmp_path / "run", "dpo", tuner={"name": "lora", "rank": 4}, options={"learning_rate": 1e-2}
    )
    first = logged(tmp_path / "run", "step")[0]
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert first["reward_margin"] == pytest.approx(0.0, abs=1e-5)
    assert summary["eval_metrics"]["reward_accuracy"] > 0.9


# --- references -------------------------------------------------------------------------------------------------------


def test_references_computed_ahead_change_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", ROWS)
    live = run(tiny_folder, rows, tmp_path / "live", "dpo", options={"epochs": 2})
    ahead = run(tiny_folder, rows, tmp_path / "ahead", "dpo", options={"epochs": 2, "reference_ahead": True})
    assert ahead["eval_loss"] == pytest.approx(live["eval_loss"], abs=1e-6)
    for one, other in zip(logged(tmp_path / "live", "step"), logged(tmp_path / "ahead", "step"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-6)
    assert len(list((tmp_path / "ahead" / "reference").glob("*.safetensors"))) == 1  # rows of evaluation are the same
    copy = run(
        tiny_folder, rows, tmp_path / "copy", "dpo", models={"reference": str(tiny_folder)},
        options={"epochs": 2, "reference_ahead": True},
    )  # fmt: skip
    assert copy["eval_loss"] == pytest.approx(live["eval_loss"], abs=1e-6)


@pytest.mark.slow
def test_a_policy_that_begins_with_an_adapter(tiny_folder: Path, tmp_path: Path) -> None:
    """Its reference is said to be the base; computed ahead it is the policy as it begins."""
    rows = write(tmp_path / "rows.jsonl", ROWS)
    lora = {"name": "lora", "rank": 4}
    run(tiny_folder, rows, tmp_path / "before", "orpo", tuner=lora, options={"learning_rate": 1e-2})
    start = {"warm_start": str(tmp_path / "before"), "tuner": lora}
    run(tiny_folder, rows, tmp_path / "base", "dpo", options={"max_steps": 1}, **start)
    warned = [event["text"] for event in logged(tmp_path / "base", "warning")]
    assert any("the reference is the model without the adapter that the run begins with" in text for text in warned)
    assert logged(tmp_path / "base", "step")[0]["loss"] < 0.6
    run(tiny_folder, rows, tmp_path / "own", "dpo", options={"max_steps": 1, "reference_ahead": True}, **start)
    assert logged(tmp_path / "own", "step")[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


@pytest.mark.slow
def test_a_lost_reference_is_told(tiny_folder: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", ROWS)
    options = {"epochs": 2, "reference_ahead": True, "max_steps": 2}
    run(tiny_folder, rows, tmp_path / "run", "dpo", options=options)
    shutil.rmtree(tmp_path / "run" / "reference")
    with pytest.raises(RequestError, match="lacks log-probabilities that were computed before the first step") as caught:
        run(tiny_folder, rows, tmp_path / "run", "dpo", options={**options, "max_steps": 4, "resume": True})
    assert "\n" not in str(caught.value)


# --- resuming, and several processes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainer", "options"),
    [
        pytest.param("dpo", {}, marks=SLOWLY), ("dpo", {"reference_ahead": True, "rpo_alpha": 0.5}),
        pytest.param("orpo", {}, marks=SLOWLY), pytest.param("kto", {}, marks=SLOWLY),
    ],
)  # fmt: skip
def test_a_resumed_run_ends_with_the_same_weights(
    trainer: str, options: dict[str, Any], tiny_folder: Path, tmp_path: Path
) -> None:
    rows = write(tmp_path / "rows.jsonl", LABELLED if trainer == "kto" else ROWS)
    common = {**options, "epochs": 2, "save_every": 3, "keep": 0, "schedule": "constant"}
    lora = {"name": "lora", "rank": 4, "dropout": 0.1}
    run(tiny_folder, rows, tmp_path / "whole", trainer, tuner=lora, options=common)
    run(tiny_folder, rows, tmp_path / "parts", trainer, tuner=lora, options={**common, "max_steps": 3})
    run(tiny_folder, rows, tmp_path / "parts", trainer, tuner=lora, options={**common, "resume": True})
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    last = [logged(tmp_path / name, "step")[-1] for name in ("whole", "parts")]
    assert last[0]["loss"] == last[1]["loss"]
    assert last[0]["reward_margin"] == last[1]["reward_margin"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "options"), [("dpo", {"loss": "sigmoid,sft", "reference_ahead": True}), ("orpo", {}), ("kto", {"beta": 0.3})]
)
def test_two_processes_are_one(trainer: str, options: dict[str, Any], tiny_folder: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", LABELLED[:18] if trainer == "kto" else ROWS[:14])  # the last step is uneven
    found = []
    for processes, size in ((1, 8), (2, 4)):
        found.append(run(
            tiny_folder, rows, tmp_path / str(processes), trainer, options={**options, "batch_size": size, "epochs": 2},
            backend={"name": "torch", "device": "cpu", "precision": "fp32", "processes": processes},
        ))  # fmt: skip
    one, two = (logged(tmp_path / name, "step") for name in ("1", "2"))
    assert [step["loss"] for step in one] == pytest.approx([step["loss"] for step in two], abs=1e-5)
    for name in ("reward_margin", "reward_accuracy", "logps_chosen", *(["kl"] if trainer == "kto" else [])):
        assert [step[name] for step in one] == pytest.approx([step[name] for step in two], abs=1e-4), name
    assert found[0]["eval_loss"] == pytest.approx(found[1]["eval_loss"], abs=1e-5)
    assert found[0]["eval_metrics"] == pytest.approx(found[1]["eval_metrics"], abs=1e-4)


# --- rows -------------------------------------------------------------------------------------------------------------


def test_refused_and_long_rows_are_accounted_for(tiny_folder: Path, tmp_path: Path) -> None:
    same = pair("how was it", "fine", "fine")
    rows = write(tmp_path / "rows.jsonl", [*ROWS[:6], same, pair("how was it", "fine", "sour and " * 20)])
    with pytest.raises(RequestError, match=r"rows.jsonl:7: the chosen and the rejected answer are the same") as caught:
        run(tiny_folder, rows, tmp_path / "stop", "dpo", held=False)
    assert "\n" not in str(caught.value)
    run(tiny_folder, rows, tmp_path / "run", "dpo", held=False, bad_rows="skip", options={"epochs": 1, "max_length": 100})
    account = logged(tmp_path / "run", "run")[0]["data"]
    assert account["samples"] == 6
    issues = [json.loads(line) for line in (tmp_path / "run" / "data" / "issues.jsonl").read_text().splitlines()]
    assert [issue["where"].rsplit(":")[-1] for issue in issues] == ["7", "8"]
    assert "max_length 100" in issues[1]["reason"]


def test_rows_of_another_form_are_told(tiny_folder: Path, tmp_path: Path) -> None:
    plain = write(tmp_path / "plain.jsonl", [{"query": "a", "response": "b"}])
    with pytest.raises(RequestError, match="the row has no 'rejected' answer"):
        run(tiny_folder, plain, tmp_path / "run", "dpo", held=False)
    with pytest.raises(RequestError, match="neither a 'label', true or false, nor a 'rejected' answer"):
        run(tiny_folder, plain, tmp_path / "run", "kto", held=False)


def test_pairs_are_two_labelled_answers(tiny_folder: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", ROWS[:4])
    run(tiny_folder, rows, tmp_path / "run", "kto", held=False, options={"epochs": 1})
    assert logged(tmp_path / "run", "run")[0]["data"]["samples"] == 8


def test_the_command_line(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from swift_core.cli.main import run as command

    rows = write(tmp_path / "rows.jsonl", ROWS[:4])
    asked = ["train", "--model", str(tiny_folder), "--dataset", rows, "--trainer", "dpo", "--output", str(tmp_path / "run")]
    mixed = "trainer.loss=[{name: sigmoid, weight: 0.8}, {name: sft, weight: 0.2}]"
    assert command([*asked, "--dry-run", mixed], debug=False) == 0
    assert command([*asked, "trainer.loss=sigmod"], debug=False) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "trainer.dpo: loss: unknown loss 'sigmod'. Did you mean: sigmoid?" in said


# --- figures and settings that would mislead --------------------------------------------------------------------------


def test_the_figure_of_imitation_is_the_loss_that_is_minimised(tiny_folder: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [*ROWS[:3], pair("how was the sea", "warm and kind and glad", "cold")])
    run(tiny_folder, rows, tmp_path / "run", "dpo", options={"loss": "sft", "epochs": 1})
    for told in logged(tmp_path / "run", "step") + logged(tmp_path / "run", "eval"):
        assert told["nll"] == pytest.approx(told["loss"], abs=1e-5)


def test_ktos_estimate_is_never_of_an_answer_to_its_own_prompt(tiny_folder: Path, tmp_path: Path) -> None:
    good = [row for row in LABELLED if row["label"]][:3]  # of which each makes the others likelier
    rows, one = write(tmp_path / "rows.jsonl", good), {"epochs": 1, "learning_rate": 1e-2}
    with pytest.raises(RequestError, match=r"trainer\.kto: a step has one answer"):
        run(tiny_folder, rows, tmp_path / "one", "kto", options={**one, "batch_size": 1})
    run(tiny_folder, rows, tmp_path / "rest", "kto", options={**one, "batch_size": 2, "max_steps": 2})
    assert logged(tmp_path / "rest", "step")[1]["kl"] == 0.0  # of the one that is left
    run(tiny_folder, rows, tmp_path / "zero", "kto", options={**one, "batch_size": 1, "loss": "apo_zero_unpaired"})
    assert "kl" not in logged(tmp_path / "zero", "step")[0]


@pytest.mark.parametrize(("trainer", "options"), [("orpo", {}), ("dpo", {"reference_free": True})])
def test_a_reference_that_nothing_reads_is_refused(
    trainer: str, options: dict[str, Any], tiny_folder: Path, tmp_path: Path
) -> None:
    rows = write(tmp_path / "rows.jsonl", ROWS[:4])
    with pytest.raises(RequestError, match=r"models\.reference: this trainer, as it is set, has no reference"):
        run(tiny_folder, rows, tmp_path / "run", trainer, options=options, models={"reference": str(tiny_folder)})
