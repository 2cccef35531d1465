"""The command `models verify`: tiny configurations by rule, the checks on a sample of architectures, results, the page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from swift_core.testing import CommandContract
from swift_plugin_verify.catalog import Architecture, choose
from swift_plugin_verify.results import LONGEST, Results, causes, passes, reasons
from swift_plugin_verify.table import counts, page

SAMPLE = [
    "LlamaForCausalLM", "Gemma2ForCausalLM", "Qwen3MoeForCausalLM", "Qwen3NextForCausalLM", "DeepseekV3ForCausalLM",
    "GPT2LMHeadModel", "BertLMHeadModel", "RobertaForCausalLM", "MambaForCausalLM", "FalconForCausalLM", "LagunaForCausalLM",
    "LlavaForConditionalGeneration", "JanusForConditionalGeneration", "GitForCausalLM", "T5ForConditionalGeneration",
    "WhisperForConditionalGeneration",
]  # fmt: skip
"""Plain, capped logits, experts, recurrent layers, latent attention, Conv1D, an encoder made a decoder, positions from the
padding id, a state space, an own linear layer, renamed experts, images, a generation of its own, images before the text,
encoder-decoders that read and that hear: what the others are variants of."""


class TestVerifyCommand(CommandContract):
    distribution, id = "swift-plugin-verify", "models verify"


def run(*args: object, ok: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "swift_core.cli.main", "models", "verify", *map(str, args)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert (done.returncode == 0) == ok, done.stderr
    return done


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The sample's results, as --json prints them; the folder they are kept in goes with them."""
    folder = tmp_path_factory.mktemp("verify")
    chosen = [part for name in SAMPLE for part in ("--architecture", name)]
    done = run(*chosen, "--output", folder, "--jobs", 2, "--json", "--table", folder / "models.md")
    return {"rows": json.loads(done.stdout), "folder": folder, "err": done.stderr}


@pytest.mark.parametrize("name", SAMPLE)
def test_an_architecture_of_the_sample_passes_in_full(results: dict[str, Any], name: str) -> None:
    rows = [row for row in results["rows"] if row["name"] == name]
    assert rows
    for row in rows:
        assert reasons(row) == []
        assert passes(row)
        assert {"build", "load", "mask", "head", "lora", "full", "merge", "generate", "packing", "recompute"} <= row[
            "checks"
        ].keys()


def test_packing_says_where_samples_are_padded_instead(results: dict[str, Any]) -> None:
    notes = {row["name"]: row["checks"]["packing"]["note"] for row in results["rows"]}
    assert notes["MambaForCausalLM"].startswith("padded: this model lets samples laid end to end see each other")
    assert notes["LlamaForCausalLM"] == ""


def test_the_page_names_each_architecture_with_its_checks(results: dict[str, Any]) -> None:
    text = (results["folder"] / "models.md").read_text(encoding="utf-8")
    assert "## Text generation" in text
    assert "## Image and text" in text
    line = next(line for line in text.splitlines() if line.startswith("| MambaForCausalLM |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1] == "mamba"
    assert cells.count("padded") == 1
    assert "**no**" not in line


def test_a_second_call_goes_on_with_what_is_known(results: dict[str, Any]) -> None:
    known = (results["folder"] / "results.jsonl").read_text(encoding="utf-8")
    done = run("--architecture", "LlamaForCausalLM", "--output", results["folder"])
    assert "are known; --again tries them anew" in done.stderr
    assert (results["folder"] / "results.jsonl").read_text(encoding="utf-8") == known


def test_a_folder_is_verified_as_it_is(tiny_folder: Path, tmp_path: Path) -> None:
    done = run("--model", tiny_folder, "--output", tmp_path, "--json")
    (row,) = json.loads(done.stdout)
    assert (row["kind"], row["name"]) == ("folder", str(tiny_folder))
    assert {check["state"] for check in row["checks"].values()} == {"pass"}


def test_a_damaged_folder_fails_with_the_reason(tiny_folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    done = run("--model", broken, "--output", tmp_path / "out", "--json", ok=False)
    (row,) = json.loads(done.stdout)
    assert row["checks"]["load"]["state"] == "fail"
    assert "is truncated" in row["checks"]["load"]["note"]
    assert row["checks"]["full"] == {"state": "not run", "note": "load failed"}
    assert done.stderr.strip().splitlines()[-1] == "error: 1 of 1 miss a check"


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    done = run("--architecture", "LamaForCausalLM", "--output", tmp_path, ok=False)
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith(
        "error: no architecture 'LamaForCausalLM' in the installed transformers version. Did you mean: Llama"
    )


# --- without models ---------------------------------------------------------------------------------------------------


def test_a_choice_is_by_class_or_model_type() -> None:
    known = [Architecture("text", "llama", "LlamaForCausalLM"), Architecture("image", "llava", "LlavaForConditionalGeneration")]
    assert choose(known, ["llava"], []) == ([known[1]], [])
    assert choose(known, ["LlamaForCausalLM", "x"], []) == ([known[0]], ["x"])
    assert choose(known, [], ["image"]) == ([known[1]], [])


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    made = Results(tmp_path)
    row = made.add({"kind": "text", "model_type": "a", "name": "A", "checks": {"load": {"state": "pass", "note": ""}}})
    with made.file.open("a", encoding="utf-8") as file:
        file.write('{"kind": "text", "model')
    assert Results(tmp_path).rows == {"text/a/A": row}


def test_results_of_other_versions_are_made_anew(tmp_path: Path) -> None:
    made = Results(tmp_path)
    made.add({"kind": "text", "model_type": "a", "name": "A", "checks": {}})
    made.file.write_text(made.file.read_text().replace(made.versions["transformers"], "0.0"))
    assert Results(tmp_path).rows == {}


def test_the_counts_take_what_does_not_apply_for_passed() -> None:
    good, none = {"state": "pass", "note": ""}, {"state": "n/a", "note": "none"}
    bad, left = {"state": "fail", "note": "a | b"}, {"state": "not run", "note": ""}
    rows = [
        {"kind": "text", "model_type": "a", "name": "A", "checks": {"load": good, "recompute": none}},
        {"kind": "text", "model_type": "b", "name": "B", "checks": {"load": bad, "recompute": left}},
    ]
    assert counts(rows) == {"text": (1, 2)}
    text = page(rows, {"transformers": "5", "swift_core": "0"}, {"A": "alpha"})
    assert "- Text generation: 1 of 2 architectures pass in full (50.0%)" in text
    assert "| A | a | alpha | yes | – |" in text
    assert "- B (b): load: a \\| b" in text


def test_what_is_behind_several_checks_is_said_once() -> None:
    def row(model_type: str, **notes: str) -> dict[str, Any]:
        checks = {name: {"state": "fail", "note": note} for name, note in notes.items()}
        return {"kind": "text", "model_type": model_type, "name": "A", "checks": checks}

    assert reasons(row("a", head="x", lora="y", full="x")) == ["head, full: x", "lora: y"]
    assert reasons(row("a", head="x" * 200)) == [f"head: {'x' * 160} ..."]
    (cause,) = reasons(row("prophetnet", generate="token 6 is 58", packing="0.27"))
    assert cause.startswith("generate, packing: the library's model")
    assert reasons(row("prophetnet", load="no file", generate="token 6"))[0] == "load: no file"  # which it does not explain


def test_every_cause_is_of_a_model_type_and_fits_a_line() -> None:
    from swift_plugin_verify.worker import list_architectures

    known = {one.model_type for one in list_architectures()}
    for model_type, found in causes().items():
        assert model_type in known
        assert found["checks"]
        assert len(found["cause"]) <= LONGEST


def test_the_page_says_which_libraries_were_there() -> None:
    row = {"kind": "text", "model_type": "a", "name": "A", "checks": {"load": {"state": "pass", "note": ""}}}
    own = {"transformers": "5", "swift_core": "0"}
    assert "uses. Not installed: torchvision, timm, torchaudio. This page" in page([row], own, {})
    told = "uses. Installed beside: timm 1.0; not installed: torchvision, torchaudio. This page"
    assert told in page([row], own | {"timm": "1.0"}, {})
    all_three = own | {"timm": "1.0", "torchvision": "0.28", "torchaudio": "2.11"}
    assert "uses. Installed beside: torchvision 0.28, timm 1.0, torchaudio 2.11. This page" in page([row], all_three, {})


def test_a_torchvision_whose_operators_do_not_load_is_imported_all_the_same(tmp_path: Path) -> None:
    """It looks its operators up by name while it is imported, and finds none beside a build of torch for the CPU."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "_C.so").write_text("no library")
    lines = ["import torch", "for name in ('nms', 'qnms'):", "    torch.library.register_fake(f'torchvision::{name}')(print)"]
    (package / "__init__.py").write_text("\n".join(lines))
    env = os.environ | {"PYTHONPATH": str(tmp_path)}

    def said(code: str) -> str:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120).stderr

    assert "operator torchvision::nms does not exist" in said("import torchvision")
    assert said("import swift_plugin_verify.vision_ops, torchvision") == ""


@pytest.mark.slow
def test_text_architectures_pass_in_full(tmp_path: Path) -> None:
    """All of the installed version: at least 95 % pass, and each miss has its reason."""
    done = run("--kind", "text", "--output", tmp_path, "--json", ok=False)
    rows = json.loads(done.stdout)
    assert sum(passes(row) for row in rows) >= 0.95 * len(rows)
    assert all(reason for row in rows if not passes(row) for reason in reasons(row))
    failed = {row["model_type"]: {name for name, check in row["checks"].items() if check["state"] == "fail"} for row in rows}
    for model_type in causes().keys() & failed.keys():  # what has come to pass needs no cause
        assert failed[model_type] & set(causes()[model_type]["checks"]), model_type
