"""`infer`, `chat`, `eval`, `export` and `quantize`: a trained model at work, and what becomes of a killed call."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support import THREADS, Forks, Result, chat_row, checkpoint, summary, swift, write_rows
from swift_plugin_transformers.testing import save_tiny

FACTS = [chat_row(f"Say {word}", f"{word}!") for word in ("one", "two", "red", "blue", "sea")]


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("facts") / "facts.jsonl", FACTS)


LEARN = [THREADS, "tuner.rank=16", "trainer.epochs=60", "trainer.learning_rate=1e-2", "trainer.batch_size=5",
         "trainer.log_every=50", "trainer.save_every=60", "trainer.eval_every=60"]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with larger weights: adapters alone can make it sure of what it says."""
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny", initializer_range=0.3)


@pytest.fixture(scope="module")
def trained(model: Path, facts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run that knows its five answers by heart."""
    output = tmp_path_factory.mktemp("trained") / "run"
    swift("train", "--model", model, "--dataset", facts, "--output", output, f"eval_dataset={facts}", *LEARN).ok()
    assert summary(output)["eval_loss"] < 0.01
    return output


def answers(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# --- infer ------------------------------------------------------------------------------------------------------------


def test_infer_answers_in_order(trained: Path, facts: Path, tmp_path: Path) -> None:
    done = swift("infer", "--model", trained, "--dataset", facts, "--output", tmp_path / "out.jsonl", "--max-tokens", 12).ok()
    assert done.out == f"5 rows answered: {tmp_path}/out.jsonl\n"
    for number, (row, fact) in enumerate(zip(answers(tmp_path / "out.jsonl"), FACTS, strict=True)):
        question, answer = fact["messages"]
        assert row == {
            "row": number, "where": f"{facts}:{number + 1}", "messages": [question], "reference": answer["content"],
            "response": answer["content"], "finish": "stop", "tokens": len(answer["content"]) + 1,
        }  # fmt: skip
    assert list(tmp_path.iterdir()) == [tmp_path / "out.jsonl"]


def test_infer_with_an_adapter_on_its_model(trained: Path, model: Path, facts: Path, tmp_path: Path) -> None:
    out = {name: tmp_path / f"{name}.jsonl" for name in ("run", "adapter", "base")}
    swift("infer", "--model", trained, "--dataset", facts, "--output", out["run"], "--max-tokens", 12).ok()
    base = ["infer", "--model", model, "--dataset", facts, "--max-tokens", 12]
    swift(*base, "--output", out["adapter"], "--adapter", checkpoint(trained)).ok()
    swift(*base, "--output", out["base"]).ok()
    assert out["run"].read_bytes() == out["adapter"].read_bytes()
    assert all(row["response"] != row["reference"] for row in answers(out["base"]))


def test_infer_counts_rows_that_cannot_be_answered(trained: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [FACTS[0], {"foo": 1}, FACTS[1], {"messages": [{"role": "user"}]}, FACTS[2]])
    command = ["infer", "--model", trained, "--dataset", rows, "--max-tokens", 12]
    done = swift(*command, "--output", tmp_path / "out.jsonl").ok()
    assert done.out == f'3 rows answered, 2 failed (see their "error"): {tmp_path}/out.jsonl\n'
    found = answers(tmp_path / "out.jsonl")
    assert [row["row"] for row in found] == [0, 1, 2, 3, 4]
    assert ["error" in row for row in found] == [False, True, False, True, False]
    assert found[1]["error"].startswith("unrecognised row; keys found: foo")
    assert [found[n]["response"] for n in (0, 2, 4)] == ["one!", "two!", "red!"]
    shown = swift(*command, "--output", tmp_path / "again.jsonl", "--json").ok().json()
    assert shown == {"output": f"{tmp_path}/again.jsonl", "answered": 3, "failed": 2, "resumed": 0}


def test_infer_when_no_row_can_be_answered(trained: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"foo": 1}])
    done = swift("infer", "--model", trained, "--dataset", rows, "--output", tmp_path / "out.jsonl")
    assert (done.code, done.error) == (1, f"no row could be answered; {tmp_path}/out.jsonl gives the reason for each")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows for several chunks."""
    rows = [chat_row(f"Say {n}", str(n)) for n in range(100)]
    return write_rows(tmp_path_factory.mktemp("many") / "rows.jsonl", rows)


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_infer_goes_on_after_kill_9(trained: Path, many: Path, forks: Forks, tmp_path: Path, temperature: str) -> None:
    command = ["infer", "--model", trained, "--dataset", many, "--max-tokens", 24, "--temperature", temperature, THREADS]
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    swift(*command, "--output", whole).ok()
    run = forks.start(*command, "--output", output)
    assert run.until(lambda: output.exists() and output.stat().st_size > 0)
    run.kill()
    held = output.read_bytes()
    assert 0 < held.count(b"\n") < 100, "the kill came too late to mean anything"
    output.write_bytes(held + b'{"row": 9, "respo')  # a half-written line
    again = swift(*command, "--output", output).ok()
    assert f"{output}: {held.count(10)} rows are answered already, going on with row {held.count(10)}" in again.err
    # Which rows share a batch does not change an answer; its padding may change a sum of floats, never seen to matter here.
    assert [row["response"] for row in answers(output)] == [row["response"] for row in answers(whole)]
    assert output.read_bytes() == whole.read_bytes()


def test_infer_keeps_what_is_finished_or_of_another_job(trained: Path, facts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    command = ["infer", "--model", trained, "--dataset", facts, "--output", output, "--max-tokens", 4]
    swift(*command).ok()
    before = output.read_bytes()
    done = swift(*command)
    expected = f"output {output} exists and is finished; choose another --output, or remove it"
    assert (done.code, done.error, output.read_bytes()) == (2, expected, before)
    (tmp_path / "out.jsonl.job").write_text("of another call", encoding="utf-8")
    done = swift(*command)
    expected = f"output {output} was begun with another model, data set or settings; remove it, or choose another"
    assert (done.code, done.error, output.read_bytes()) == (2, expected, before)


def test_infer_stops_at_a_text(trained: Path, facts: Path, tmp_path: Path) -> None:
    command = ["infer", "--model", trained, "--dataset", facts, "--output", tmp_path / "out.jsonl", "--max-tokens", 12]
    swift(*command, "--stop", "e", "--stop", "o").ok()
    assert [row["response"] for row in answers(tmp_path / "out.jsonl")] == ["", "tw", "r", "blu", "s"]
    assert {row["finish"] for row in answers(tmp_path / "out.jsonl")} == {"stop"}


# --- chat -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def chat(trained: Path) -> Callable[..., Result]:
    return lambda text, *more: swift("chat", "--model", trained, "--max-tokens", 12, *more, stdin=text)


def test_chat_answers_each_line(chat: Callable[..., Result]) -> None:
    assert chat("Say red\n").ok().out == "red!\n"


def test_chat_saves_what_was_said(chat: Callable[..., Result], tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    talk = (
        "Say red\n/clear\nSay sea\n\n" + f"/save {file}\n"
        "/system Be brief.\none\\\ntwo\n" + f"/save {file}\n"
        '/system\n"""\nfirst\n/second\n"""\n' + f"/save {file}\n/exit\nSay blue\n"
    )
    lines = chat(talk).ok().out.splitlines()
    assert lines[:4] == ["red!", "(forgotten)", "sea!", f"(added to {file})"]
    assert lines[4] == "(system message set; the talk begins anew)"
    assert "(no system message; the talk begins anew)" in lines
    assert lines[-1] == f"(added to {file})", "nothing comes after /exit"
    first, second, third = (row["messages"] for row in answers(file))
    assert first == FACTS[4]["messages"]
    assert second[:2] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one\ntwo"}]
    assert [message["role"] for message in second] == ["system", "user", "assistant"]
    assert third[0] == {"role": "user", "content": "first\n/second"}


def test_chat_remembers_and_forgets(chat: Callable[..., Result], trained: Path, tmp_path: Path) -> None:
    """The same question has one answer in a fresh talk, and the talk so far is part of the next prompt."""
    file = tmp_path / "talk.jsonl"
    chat(f"Say red\nSay sea\n/save {file}\n").ok()
    (talk,) = (row["messages"] for row in answers(file))
    assert [message["role"] for message in talk] == ["user", "assistant", "user", "assistant"]
    assert chat("Say red\n/clear\nSay sea\n").out.splitlines()[-1] == "sea!"
    whole = write_rows(tmp_path / "row.jsonl", [{"messages": talk}])
    swift("infer", "--model", trained, "--dataset", whole, "--output", tmp_path / "out.jsonl", "--max-tokens", 12).ok()
    assert answers(tmp_path / "out.jsonl")[0]["response"] == talk[-1]["content"]


def test_chat_with_a_wrong_command(chat: Callable[..., Result]) -> None:
    done = chat("/sysstem x\n/save /nowhere/talk.jsonl\nSay red\n").ok()
    assert done.out.startswith("(no command /sysstem) /system TEXT sets the system message, ")
    assert "(not saved: /nowhere/talk.jsonl: No such file or directory)" in done.out
    assert done.out.endswith("red!\n")


# --- eval -------------------------------------------------------------------------------------------------------------


def test_eval_scores_right_and_wrong_answers(trained: Path, tmp_path: Path) -> None:
    """Of four rows three are answered right; by words, the fourth shares one of two with its reference."""
    rows = write_rows(tmp_path / "rows.jsonl", [*FACTS[:3], chat_row("Say blue", "blue sky!")])
    command = ["eval", "--model", trained, "--dataset", rows, "evaluator.max_tokens=12"]
    shown = swift(*command, "--json", "--output", tmp_path / "report.json").ok().json()
    assert shown["metrics"]["exact_match"] == 0.75
    assert shown["metrics"]["token_f1"] == pytest.approx((3 + 2 / 3) / 4)
    assert shown["metrics"]["rouge_l"] == pytest.approx((3 + 2 / 3) / 4)
    assert (shown["counts"]["rows"], shown["counts"]["scored"], shown["counts"]["refused"]) == (4, 4, 0)
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["metrics"] == shown["metrics"]
    assert [row["prediction"] for row in report["rows"]] == ["one!", "two!", "red!", "blue!"]
    assert [row["scores"]["exact_match"] for row in report["rows"]] == [1, 1, 1, 0]
    table = swift(*command).ok().out
    assert "exact_match  0.7500" in table
    assert table.splitlines()[-1] == "4 rows, 25 trained tokens, 4 scored, 0 refused"


def test_eval_perplexity_is_that_of_the_training_run(trained: Path, facts: Path) -> None:
    shown = swift("eval", "--model", trained, "--dataset", facts, "evaluator.metrics=perplexity", "--json").ok().json()
    assert shown["metrics"] == {"perplexity": pytest.approx(math.exp(summary(trained)["eval_loss"]), rel=1e-5)}


def test_eval_of_the_untrained_model(tiny_folder: Path, facts: Path) -> None:
    shown = swift("eval", "--model", tiny_folder, "--dataset", facts, "evaluator.max_tokens=4", "--json").ok().json()
    assert shown["metrics"]["exact_match"] == 0
    assert 150 < shown["metrics"]["perplexity"] < 400  # near the 259 tokens of the vocabulary


# --- export and quantize ----------------------------------------------------------------------------------------------


def test_export_merges_without_a_gap(trained: Path, model: Path, facts: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    done = swift("export", "--model", trained, "--output", merged, "--json").ok()
    assert done.json() == {"output": str(merged), "gap": pytest.approx(0, abs=1e-4)}
    assert "largest log-probability gap to the adapter: " in done.err
    base, weights = load_file(model / "model.safetensors"), load_file(merged / "model.safetensors")
    assert set(weights) == set(base)
    assert float((weights["model.layers.0.mlp.up_proj.weight"] - base["model.layers.0.mlp.up_proj.weight"]).abs().max()) > 1e-2
    for model, name in ((trained, "one.jsonl"), (merged, "two.jsonl")):
        swift("infer", "--model", model, "--dataset", facts, "--output", tmp_path / name, "--max-tokens", 12).ok()
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    again = swift("export", "--model", trained, "--output", merged)
    expected = f"output {merged} exists and is not empty; choose another, or replace a model with --overwrite"
    assert (again.code, again.error) == (2, expected)
    swift("export", "--model", trained, "--output", merged, "--overwrite").ok()
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_export_of_what_has_no_adapter(model: Path, tmp_path: Path) -> None:
    done = swift("export", "--model", model, "--output", tmp_path / "merged")
    expected = f"model {model} has no adapter to merge: give a run, a checkpoint or an adapter's folder"
    assert (done.code, done.error) == (2, expected)


def test_quantize_a_folder_train_on_it_and_serve_it(model: Path, facts: Path, tmp_path: Path) -> None:
    small, run = tmp_path / "small", tmp_path / "run"
    shown = swift("quantize", "--model", model, "--quantizer", "hqq", "quantizer.bits=8", "--output", small, "--json")
    result = shown.ok().json()
    assert result["output"] == str(small)
    coarse = swift("quantize", "--model", model, "--quantizer", "hqq", "quantizer.bits=4", "--output", tmp_path / "4", "--json")
    assert 0 < result["gap"] < coarse.ok().json()["gap"] / 4
    assert result["bytes_after"] == sum(file.stat().st_size for file in small.glob("*.safetensors")) < result["bytes_before"]
    assert swift("models", "show", small, "--json").ok().json()["quantization"] == "hqq"
    swift("train", "--model", small, "--dataset", facts, "--output", run, *LEARN).ok()
    swift("infer", "--model", run, "--dataset", facts, "--output", tmp_path / "out.jsonl", "--max-tokens", 12).ok()
    assert all(row["response"] == row["reference"] for row in answers(tmp_path / "out.jsonl"))
    again = swift("quantize", "--model", small, "--quantizer", "hqq", "--output", tmp_path / "twice")
    assert (again.code, again.error) == (2, f"model {small} is quantized by hqq already")
    full = swift("train", "--model", small, "--dataset", facts, "--output", tmp_path / "full", "--tuner", "full")
    expected = "tuner.full: weights quantized by hqq cannot be trained; use an adapter such as lora"
    assert (full.code, full.error) == (2, expected)
