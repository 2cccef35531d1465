"""Rules that hold between the parts of a run: what is trained is what is served, no row stands on both sides, a step back
is a step back, packing only where samples are isolated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import THREADS, chat_row, state, summary, sums, swift, weights, write_rows
from swift_core.config import Component, RunConfig
from swift_core.session import Session

ALWAYS = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def command(tiny_folder: Path, rows: Path) -> list[object]:
    return ["train", "--model", tiny_folder, "--dataset", rows, THREADS, "trainer.learning_rate=1e-2"]


def test_going_back_to_a_step_forgets_the_later_ones(command: list[object], tmp_path: Path) -> None:
    every = [*command, "trainer.max_steps=6", "trainer.save_every=1", "trainer.keep=0", "trainer.epochs=9"]
    swift(*every, "--output", tmp_path / "a").ok()
    final = state(tmp_path / "a", 6)
    early = tmp_path / "a" / "checkpoints" / "step-2"
    swift(*every, "--output", tmp_path / "a", f"trainer.resume={early}", "trainer.keep=2").ok()
    names = sorted(path.name for path in (tmp_path / "a" / "checkpoints").iterdir())
    assert names == ["last", "step-5", "step-6"]
    assert state(tmp_path / "a") == final


def test_a_run_that_stopped_early_stays_so(command: list[object], tmp_path: Path) -> None:
    stopping = [*command, "trainer.learning_rate=1e-30", "trainer.patience=2", "trainer.eval_every=1", "holdout=3"]
    stopping += ["trainer.epochs=9", "--output", tmp_path / "a"]
    swift(*stopping).ok()
    before, steps = weights(tmp_path / "a"), summary(tmp_path / "a")["steps"]
    assert steps == 3
    swift(*stopping, "trainer.resume=true").ok()
    assert (weights(tmp_path / "a"), summary(tmp_path / "a")["steps"]) == (before, steps)


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_the_template_of_training_is_that_of_use(command: list[object], tuner: str, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(ALWAYS)
    options = [f"template.file={tmp_path / 'own.jinja'}", "--tuner", tuner, "trainer.max_steps=1"]
    swift(*command, *options, "--output", tmp_path / "a").ok()
    with Session(RunConfig(model=Component(str(tmp_path / "a")))) as session:
        template = session.template(session.model_ref, session.processor(session.model_ref))
        ids = template.prompt([{"role": "user", "content": "hi"}])
        assert template.tokenizer.decode(ids) == "[user]hi</s>[assistant]"  # type: ignore[attr-defined]


def test_no_row_stands_on_both_sides(tiny_folder: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "d.jsonl", sums(1, 8))
    config = RunConfig(Component(str(tiny_folder)), [Component(str(file), options={"weight": 2.5})], holdout=0.5)
    with Session(config) as session:
        template = session.template(session.model_ref, session.processor(session.model_ref))
        prepared, account = session.prepare(template)
    held, trained = {sample.where for sample in prepared.eval}, [sample.where for sample in prepared.train]
    assert len(held) == 4
    assert not held & set(trained)
    assert sorted(trained.count(where) for where in set(trained)) == [2, 2, 3, 3]
    assert account.rows == 10


def test_freeze_takes_names_as_they_are_written(command: list[object], tmp_path: Path) -> None:
    wrong = swift(*command, "--tuner", "full", "--freeze", "re:(", "--output", tmp_path / "a")
    assert wrong.code == 2
    assert wrong.error.startswith("freeze: 're:(' is not a regular expression")
    absent = swift(*command, "--tuner", "full", "--freeze", "odel.layers", "--output", tmp_path / "a")
    assert absent.error == (
        "freeze: no trained parameter's name begins with 'odel.layers'; the first is model.embed_tokens.weight"
    )


def test_packing_is_refused_where_samples_see_each_other(tmp_path: Path) -> None:
    import torch
    from swift_plugin_transformers.testing import make_tokenizer
    from transformers import MambaConfig, MambaForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": len(tokenizer)}
    MambaForCausalLM(MambaConfig(**shape)).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    file = write_rows(tmp_path / "d.jsonl", [chat_row("a", "b"), chat_row("c", "d")])
    packed = ["trainer.packing=true", "trainer.max_length=256", "--tuner", "full", "--output", tmp_path / "a"]
    refused = swift("train", "--model", tmp_path / "mamba", "--dataset", file, *packed)
    assert refused.code == 2
    assert refused.error.startswith("trainer.packing: this model lets samples laid end to end see each other")


def test_an_adapter_of_another_tool_is_what_is_scored(command: list[object], rows: Path, tmp_path: Path) -> None:
    swift(*command, "trainer.epochs=2", "--output", tmp_path / "a").ok()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (foreign / name).write_bytes((tmp_path / "a" / "checkpoints" / "last" / name).read_bytes())
    asked = ["eval", "--dataset", rows, "evaluator.metrics=[perplexity]", "--json", "--model"]
    scores = [json.loads(swift(*asked, model).out)["metrics"]["perplexity"] for model in (tmp_path / "a", foreign)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)
    base = json.loads(swift(*asked, command[2]).out)["metrics"]["perplexity"]
    assert base > scores[0] * 1.05


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("trainer.clip=-1", "trainer.sft: clip must be above 0 or null, not -1.0"),
        ("trainer.learning_rate=nan", "trainer.sft.learning_rate: expected number, not 'nan'"),
        ("trainer.betas=[2,3]", "trainer.sft: betas takes two numbers of at least 0 and below 1, not [2.0, 3.0]"),
        ("holdout=.inf", "holdout: expected number, not '.inf'"),
        ("models.teacher=there", "models.teacher: this trainer has no such model; it uses no other model"),
    ],
)
def test_what_a_run_cannot_do_is_said_before_it_begins(command: list[object], option: str, said: str, tmp_path: Path) -> None:
    result = swift(*command, option, "--output", tmp_path / "a")
    assert (result.code, result.error) == (2, said)
    assert not (tmp_path / "a").exists()
