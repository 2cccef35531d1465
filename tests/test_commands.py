"""`swift-core train`: what a request's parts do to the run, and what a run leaves in its folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from support import THREADS, chat_row, checkpoint, events, state, summary, sums, swift, weights, write_rows


@pytest.fixture
def command(tiny_folder: Path, rows: Path) -> list[object]:
    return ["train", "--model", tiny_folder, "--dataset", rows, THREADS]


def adapter(run: Path) -> dict[str, Any]:
    return load_file(checkpoint(run) / "adapter_model.safetensors")


def account(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = events(run, "run")[0]["data"]
    return found


# --- the request ------------------------------------------------------------------------------------------------------


def test_yaml_then_flags_then_overrides(tiny_folder: Path, rows: Path, tmp_path: Path) -> None:
    other = write_rows(tmp_path / "other.jsonl", sums(30, 4))
    first = {
        "model": str(tiny_folder),
        "dataset": [str(rows), {"name": str(rows), "weight": 2}],
        "seed": 5,
        "tuner": {"name": "lora", "rank": 4, "alpha": 32, "targets": ["q_proj"]},
        "trainer": {"epochs": 2, "batch_size": 2},
    }
    second = {"dataset": [{"name": str(other), "weight": 2}], "tuner": {"rank": 3}}  # a list is replaced whole, the rest merged
    for name, tree in (("a.yaml", first), ("b.yaml", second)):
        (tmp_path / name).write_text(yaml.safe_dump(tree), encoding="utf-8")
    swift(
        "train",
        tmp_path / "a.yaml",
        tmp_path / "b.yaml",
        "--output",
        tmp_path / "run",
        "tuner.targets=[k_proj, v_proj]",
        "trainer.batch_size=4",
        "dataset.0.weight=3",
        THREADS,
    ).ok()
    saved = json.loads((checkpoint(tmp_path / "run") / "adapter_config.json").read_text(encoding="utf-8"))
    assert (saved["r"], saved["lora_alpha"], sorted(saved["target_modules"])) == (3, 32, ["k_proj", "v_proj"])
    assert {name.split(".")[-3] for name in adapter(tmp_path / "run")} == {"k_proj", "v_proj"}
    assert {tensor.shape[0] for name, tensor in adapter(tmp_path / "run").items() if "lora_A" in name} == {3}
    assert account(tmp_path / "run")["rows"] == 12
    assert summary(tmp_path / "run")["steps"] == 6
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert (written["seed"], written["trainer"]["batch_size"], written["trainer"]["epochs"]) == (5, 4, 2.0)
    assert [source["name"] for source in written["dataset"]] == [str(other)]


def test_a_flag_names_a_component_and_drops_options_of_another(tiny_folder: Path, rows: Path, tmp_path: Path) -> None:
    tree = {"model": str(tiny_folder), "dataset": str(rows), "tuner": {"name": "lora", "rank": 4}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    swift("train", tmp_path / "run.yaml", "--tuner", "full", "--output", tmp_path / "run", THREADS).ok()
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["tuner"] == {
        "name": "full", "only": [], "parts": [], "share": 1.0,
    }  # fmt: skip


def test_dry_run_checks_everything_and_writes_nothing(command: list[object], tmp_path: Path) -> None:
    done = swift(*command, "--output", tmp_path / "run", "--dry-run").ok()
    assert done.out == "dry run: the request is sound; nothing was trained\n"
    assert "data: 13 rows, 13 samples, " in done.err
    assert list(tmp_path.iterdir()) == []
    shown = swift(*command, "--output", tmp_path / "run", "--dry-run", "--json").ok().json()
    assert shown["config"]["tuner"]["rank"] == 8
    assert shown["data"]["rows"] == 13
    assert swift(*command, "--dry-run", "tuner.rnak=1").code == 2


def test_help_lists_the_options_of_what_was_chosen() -> None:
    shown = swift("train", "--tuner", "lora", "--help").ok().out
    assert "tuner.rank  (whole number, default 8)\n      rank of the update; higher learns more and takes more memory" in shown
    assert "trainer.learning_rate  (number, default 0.0001)" in shown
    assert "tuner.only" not in shown
    assert "tuner.only" in swift("train", "--tuner", "full", "--help").ok().out


# --- data -------------------------------------------------------------------------------------------------------------


def test_sources_are_sampled_and_weighted(tiny_folder: Path, tmp_path: Path) -> None:
    """5 rows of 10, each twice, and half of 6 rows, each the same for the same seed; a weight is for training only."""
    one = write_rows(tmp_path / "one.jsonl", [chat_row("one", "x" * 2**n) for n in range(10)])
    two = write_rows(tmp_path / "two.jsonl", [chat_row("two", "x" * 2**n) for n in range(10, 16)])
    command = ["--model", tiny_folder, f"--dataset={one}#5", f"--dataset={two}", "dataset.0.weight=2", "dataset.1.weight=0.5"]
    shown = swift("inspect", *command, "--json").ok().out
    sampled = [json.loads(line)["trained_tokens"] - 1 for line in shown.splitlines()]  # the answer's length without its end
    assert (len(sampled), len(set(sampled))) == (11, 11)
    assert sum(length < 2**10 for length in sampled) == 5
    assert swift("inspect", *command, "--json").out == shown
    assert swift("inspect", *command, "--json", "seed=1").out != shown
    whole = swift("train", *command, "--dry-run", "--json", "trainer.max_length=null").ok().json()["data"]
    assert whole["samples"] == 2 * 5 + 3
    ones, twos = divmod(whole["trained_tokens"] - whole["samples"], 2**10)[::-1]
    assert ones == 2 * sum(length for length in sampled if length < 2**10) % 2**10
    carried = 2 * sum(length for length in sampled if length < 2**10) // 2**10
    assert (twos - carried).bit_count() == 3


def test_held_out_rows_are_not_trained_on(tiny_folder: Path, tmp_path: Path) -> None:
    """Each row has a length of its own, so that the tokens tell which rows were held out."""
    rows = write_rows(tmp_path / "rows.jsonl", [chat_row("?", "x" * 2**n) for n in range(10)])
    swift("train", "--model", tiny_folder, "--dataset", rows, "--output", tmp_path / "run", "holdout=0.3", THREADS).ok()
    data = account(tmp_path / "run")
    assert (data["rows"], data["eval"]["rows"]) == (7, 3)
    extra = 1  # the end marker of each answer is trained too
    answers = data["trained_tokens"] - 7 * extra, data["eval"]["trained_tokens"] - 3 * extra
    assert sum(answers) == 2**10 - 1
    assert (answers[0].bit_count(), answers[1].bit_count()) == (7, 3)


# --- what is trained --------------------------------------------------------------------------------------------------


def test_loss_is_that_of_a_random_model_and_falls(command: list[object], tmp_path: Path) -> None:
    swift(*command, "--output", tmp_path / "run", "--tuner", "full", "trainer.epochs=30", "trainer.learning_rate=3e-3").ok()
    losses = [event["loss"] for event in events(tmp_path / "run", "step")]
    assert losses[0] == pytest.approx(math.log(259), abs=0.3)  # 256 bytes and 3 special tokens, near uniform
    assert losses[-1] < 1.0
    rates = [event["learning_rate"] for event in events(tmp_path / "run", "step")]
    assert max(rates) == pytest.approx(3e-3)
    assert rates[0] == pytest.approx(3e-3 / 6)  # warm-up over a twentieth of 120 steps
    assert rates[-1] < 1e-5


def test_warm_start_begins_with_the_weights_of_a_run(command: list[object], rows: Path, tmp_path: Path) -> None:
    swift(*command, "--output", tmp_path / "first", "trainer.epochs=4", "trainer.learning_rate=1e-2").ok()
    again = swift("train", "--from", tmp_path / "first", "--dataset", rows, "--output", tmp_path / "second", THREADS,
                  "trainer.max_steps=1", "trainer.learning_rate=1e-9").ok()  # fmt: skip
    assert "1 steps" in again.err, "a new run counts from the beginning"
    first, second = adapter(tmp_path / "first"), adapter(tmp_path / "second")
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-7
    assert max(float(first[name].abs().max()) for name in first if "lora_B" in name) > 1e-3
    planned = json.loads((tmp_path / "second" / "plan.json").read_text(encoding="utf-8"))["components"]["model"]["name"]
    assert planned == json.loads((tmp_path / "first" / "plan.json").read_text(encoding="utf-8"))["components"]["model"]["name"]


def test_frozen_parts_stay_as_they_are(command: list[object], tmp_path: Path) -> None:
    swift(*command, "--output", tmp_path / "run", "--freeze", r"re:layers\.0\.").ok()
    moved = {name: float(tensor.abs().max()) > 0 for name, tensor in adapter(tmp_path / "run").items() if "lora_B" in name}
    assert {name for name, changed in moved.items() if changed} == {name for name in moved if ".layers.1." in name}


def test_full_tuner_writes_a_model_folder(command: list[object], tiny_folder: Path, rows: Path, tmp_path: Path) -> None:
    swift(*command, "--output", tmp_path / "run", "--tuner", "full", r"tuner.only=re:layers\.1\..*mlp", "trainer.epochs=2").ok()
    base, tuned = load_file(tiny_folder / "model.safetensors"), load_file(checkpoint(tmp_path / "run") / "model.safetensors")
    assert set(base) == set(tuned)
    assert {name for name in base if not base[name].equal(tuned[name])} == {
        f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")
    }
    shown = swift("models", "show", tmp_path / "run", "--json").ok().json()
    assert (shown["architecture"], shown["adapter"]) == ("LlamaForCausalLM", None)
    swift("train", "--model", tmp_path / "run", "--dataset", rows, "--output", tmp_path / "next", THREADS).ok()


def test_pretraining_trains_every_token_and_splits_long_texts(tiny_folder: Path, tmp_path: Path) -> None:
    texts = ["short", "a somewhat longer line of text", "x" * 100]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    swift("train", "--model", tiny_folder, "--dataset", tmp_path / "texts.txt", "--trainer", "pt", "--output", tmp_path / "run",
          "trainer.max_length=40", THREADS).ok()  # fmt: skip
    data = account(tmp_path / "run")
    tokens = sum(len(text) + 1 for text in texts)  # a token a byte, and the end of each text
    assert (data["rows"], data["samples"], data["tokens"], data["trained_tokens"]) == (3, 5, tokens, tokens)
    assert data["reasons"] == {"split": 1}
    plan = json.loads((tmp_path / "run" / "plan.json").read_text(encoding="utf-8"))
    assert plan["components"]["template"]["name"] == "plain"


def test_packed_and_accumulated_equal_plain(command: list[object], tmp_path: Path) -> None:
    """One step over all rows: as one batch, packed, row by row, and in passes of few tokens."""
    shapes = {
        "plain": ["trainer.batch_size=13"],
        "packed": ["trainer.batch_size=13", "trainer.packing=true", "trainer.max_length=200"],
        "accumulated": ["trainer.batch_size=1", "trainer.accumulate=13"],
        "tokens": ["trainer.accumulate=13", "trainer.batch_tokens=120"],
    }
    runs = {}
    for name, settings in shapes.items():
        swift(*command, "--output", tmp_path / name, *settings, "trainer.max_steps=1").ok()
        (runs[name],) = events(tmp_path / name, "step")
    page = (tmp_path / "packed" / "report.html").read_text(encoding="utf-8")
    assert "<p>packed 13 samples into " in page
    for name, step in runs.items():
        assert step["loss"] == pytest.approx(runs["plain"]["loss"], abs=1e-5), name
        assert step["grad_norm"] == pytest.approx(runs["plain"]["grad_norm"], rel=1e-4), name
        assert (step["tokens"], step["trained_tokens"]) == (runs["plain"]["tokens"], runs["plain"]["trained_tokens"]), name


def test_lora_on_weights_quantized_while_loading(command: list[object], rows: Path, tmp_path: Path) -> None:
    settings = ["trainer.max_steps=2", "trainer.learning_rate=1e-2"]
    swift(*command, "--output", tmp_path / "plain", *settings).ok()
    swift(*command, "--output", tmp_path / "run", "--quantizer", "hqq", "quantizer.bits=4", *settings).ok()
    plan = json.loads((checkpoint(tmp_path / "run") / "plan.json").read_text(encoding="utf-8"))
    assert (plan["components"]["quantizer"]["name"], plan["components"]["quantizer"]["options"]["bits"]) == ("hqq", 4)
    (plain, *_), (quantized, *_) = events(tmp_path / "plain", "step"), events(tmp_path / "run", "step")
    assert 1e-5 < abs(plain["loss"] - quantized["loss"]) < 0.1
    assert set(adapter(tmp_path / "run")) == set(adapter(tmp_path / "plain"))
    swift(
        "infer", "--model", tmp_path / "run", "--dataset", rows, "--output", tmp_path / "answers.jsonl", "--max-tokens", 4
    ).ok()
    done = swift("export", "--model", tmp_path / "run", "--output", tmp_path / "merged")
    assert done.code == 2
    assert done.error.endswith("was trained on quantized weights: serve it as it is, base and adapter apart")


def test_stops_when_the_evaluation_no_longer_improves(command: list[object], tmp_path: Path) -> None:
    """Trained to answer one way and evaluated on another, it gets worse: the first checkpoint is the best one."""
    held = write_rows(tmp_path / "held.jsonl", [chat_row("What is 1 and 1?", "zzzzzzzzzz")])
    done = swift(*command, "--output", tmp_path / "run", f"eval_dataset={held}", "trainer.epochs=50", "trainer.patience=2",
                 "--tuner", "full", "trainer.learning_rate=3e-2", "trainer.eval_every=5").ok()  # fmt: skip
    found = summary(tmp_path / "run")
    evals = {event["step"]: event["loss"] for event in events(tmp_path / "run", "eval")}
    assert found["best_eval_loss"] == min(evals.values()) == evals[found["best_step"]]
    assert found["steps"] == found["best_step"] + 10 < 200
    assert found["stopped"] == "no better eval loss in 2 evaluations"
    assert f"stopped at step {found['steps']}: no better eval loss in 2 evaluations" in done.err
    links = tmp_path / "run" / "checkpoints"
    assert (links / "best").resolve().name == f"step-{found['best_step']}"
    assert (links / "last").resolve().name == f"step-{found['steps']}"


# --- the run's folder -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tiny_folder: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 rows trained on, 3 held out; options of every type come from the command line."""
    output = tmp_path_factory.mktemp("run") / "run"
    swift("train", "--model", tiny_folder, "--dataset", rows, "--output", output, THREADS, "holdout=3", "trainer.epochs=3",
          "trainer.keep=1", "dataset.0.sample=13", "dataset.0.weight=1", "dataset.0.columns={q: query}",
          "template.kwargs={x: 1}", "freeze=re:layers.7.|layers.1.").ok()  # fmt: skip
    return output


def test_the_folder_holds_what_it_should(run: Path) -> None:
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "plan.json", "log.jsonl", "summary.json", "report.html", "data", "checkpoints",
    }  # fmt: skip
    last = checkpoint(run)
    assert {path.name for path in last.iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors", "random-0.safetensors", "trainer.json",
        "plan.json",
    }  # fmt: skip
    assert not {path.suffix for path in run.rglob("*")} & {".bin", ".pt", ".pth", ".pkl"}
    assert (last / "plan.json").read_bytes() == (run / "plan.json").read_bytes()


def test_its_configuration_runs_again_as_it_is(run: Path, tmp_path: Path) -> None:
    swift("train", run / "config.yaml", "--output", tmp_path / "again").ok()
    assert state(tmp_path / "again") == state(run)
    whole = (run / "config.yaml").read_text(encoding="utf-8")
    assert whole.replace(str(run), str(tmp_path / "again")) == (tmp_path / "again" / "config.yaml").read_text(encoding="utf-8")


def test_its_log_tells_the_whole_story(run: Path) -> None:
    kinds = [json.loads(line)["event"] for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    story = [kind for kind in kinds if kind != "note"]
    epoch = ["step", "step", "step", "eval", "checkpoint"]
    assert story == ["run", *epoch, *epoch, *epoch, "summary"]
    keys = {"step", "steps", "loss", "learning_rate", "grad_norm", "tokens", "trained_tokens", "tokens_per_second",
            "seconds_left", "peak_bytes"}  # fmt: skip
    assert all(keys <= set(event) for event in events(run, "step"))
    assert [event["step"] for event in events(run, "step")] == list(range(1, 10))
    trained = sum(event["loss"] * event["trained_tokens"] for event in events(run, "step"))
    assert summary(run)["train_loss"] == pytest.approx(trained / summary(run)["trained_tokens"], rel=1e-6)


def test_its_summary(run: Path) -> None:
    found = summary(run)
    assert {"seconds", "peak_bytes", "train_loss", "eval_loss", "trained_tokens", "tokens_per_second"} <= set(found)
    assert found["trained_tokens"] == sum(event["trained_tokens"] for event in events(run, "step"))
    assert found["tokens"] == 3 * account(run)["tokens"]
    assert found["eval_loss"] == events(run, "eval")[-1]["loss"]
    assert (found["steps"], found["stopped"], found["output"]) == (9, None, str(run))
    assert Path(found["last"]) == run / "checkpoints" / "step-9"
    assert found["tokens_per_second"] == pytest.approx(found["tokens"] / found["seconds"], rel=0.05)
    assert 2**26 < found["peak_bytes"] < 2**33


def test_its_report(run: Path) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    for text in (
        "<h2>Loss</h2>",
        "<h2>Data</h2>",
        "<h2>Plan</h2>",
        "<svg",
        f"{summary(run)['train_loss']:.6g}",
        "LlamaForCausalLM",
    ):
        assert text in page
    assert "http" not in page.replace("http://www.w3.org", ""), "a static page that asks nothing of the network"


def test_its_plan_names_who_did_what(run: Path) -> None:
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    assert {kind: part["plugin"] for kind, part in plan["components"].items()} == {
        "model": "swift-plugin-transformers", "template": "swift-plugin-transformers", "tuner": "swift-plugin-lora",
        "trainer": "swift-plugin-supervised", "backend": "swift-plugin-torch",
    }  # fmt: skip
    assert set(plan["plugins"]) >= {part["plugin"] for part in plan["components"].values()}
    assert (plan["config"]["trust_remote_code"], plan["config"]["allow_pickle"]) == (False, False)


def test_as_json(command: list[object], tmp_path: Path) -> None:
    shown = swift(*command, "--output", tmp_path / "run", "--json").ok().json()
    assert shown == summary(tmp_path / "run")


def test_keeps_the_newest_and_the_best(command: list[object], tmp_path: Path) -> None:
    swift(*command, "--output", tmp_path / "run", "trainer.epochs=3", "trainer.save_every=1", "trainer.keep=2").ok()
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")) == ["step-11", "step-12"]
    swift(*command, "--output", tmp_path / "all", "trainer.epochs=1", "trainer.save_every=1", "trainer.keep=0").ok()
    assert len(list((tmp_path / "all" / "checkpoints").glob("step-*"))) == 4
    assert weights(tmp_path / "all", 1) != weights(tmp_path / "all", 4)
