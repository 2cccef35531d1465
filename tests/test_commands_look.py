"""`inspect`, `config`, `doctor`, `models show`: what would happen, and what is here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import THREADS, Result, chat_row, checkpoint, swift, write_rows
from swift_core import __version__
from swift_plugin_transformers.testing import CHATML

INSPECTED = ["row", "turns", "text", "trained", "appended", "kwargs", "tokens", "trained_tokens"]


def lines(done: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.out.splitlines()]


# --- inspect ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def talk(tmp_path: Path) -> Path:
    """A talk of two turns, one of them not trained; a row that is no conversation; a pair of texts."""
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello.", "train": False},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "So long."},
    ]
    return write_rows(tmp_path / "talk.jsonl", [{"messages": messages}, {"foo": 1}, {"instruction": "Add", "output": "2"}])


def test_inspect_shows_exactly_what_is_trained(tiny_folder: Path, talk: Path) -> None:
    first, refused, second = lines(swift("inspect", "--model", tiny_folder, "--dataset", talk, "--json").ok())
    assert list(first) == list(second) == INSPECTED
    text = (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nSo long.<|im_end|>\n"
    )
    assert (first["row"], first["text"], first["turns"]) == (0, text, [4])
    assert [text[start:end] for start, end in first["trained"]] == ["So long.<|im_end|>"]
    marks = 10  # each mark is one token, every other character one byte
    assert first["tokens"] == len(text) - 5 * len("<|im_start|>") - 5 * len("<|im_end|>") + marks
    assert first["trained_tokens"] == len("So long.") + 1
    assert (first["appended"], first["kwargs"]) == (None, {})
    assert list(refused) == ["row", "refused"]
    assert refused["row"] == 1
    assert refused["refused"].startswith("unrecognised row; keys found: foo. Known shapes: ")
    assert (second["row"], second["turns"]) == (2, [1])
    assert [second["text"][start:end] for start, end in second["trained"]] == ["2<|im_end|>"]


def test_inspect_is_one_compact_object_a_line(tiny_folder: Path, talk: Path) -> None:
    shown = swift("inspect", "--model", tiny_folder, "--dataset", talk, "--json").ok().out
    assert shown == "".join(
        json.dumps(json.loads(line), ensure_ascii=False, separators=(",", ":")) + "\n" for line in shown.splitlines()
    )
    assert len(swift("inspect", "--model", tiny_folder, "--dataset", talk, "--json", "--limit", 1).ok().out.splitlines()) == 1


def test_inspect_shows_what_is_trained_for_people(tiny_folder: Path, talk: Path) -> None:
    shown = swift("inspect", "--model", tiny_folder, "--dataset", talk).ok().out
    assert f"row 0 ({talk}:1): 79 tokens, 9 trained" in shown
    assert f"row 1 ({talk}:2) refused: unrecognised row" in shown
    assert "So long.<|im_end|>" in shown


def test_inspect_with_a_template_file_and_its_arguments(tiny_folder: Path, talk: Path, tmp_path: Path) -> None:
    """The file may leave out the end marker after the last answer: one is added, and that is said."""
    file, last = tmp_path / "own.jinja", "'' if loop.last and message.role == 'assistant'"
    file.write_text(
        "{{ note or '' }}" + CHATML.replace("'<|im_end|>' + '\\n'", f"({last} else '<|im_end|>')"), encoding="utf-8"
    )
    command = ["inspect", "--model", tiny_folder, "--template", file, "--dataset", talk, "--json"]
    first, _, second = lines(swift(*command).ok())
    assert (first["appended"], second["appended"]) == ("<|im_end|>", "<|im_end|>")
    assert [second["text"][start:end] for start, end in second["trained"]] == ["2<|im_end|>"]
    shown = lines(swift(*command, "template.kwargs={note: seen}").ok())[0]
    assert shown["kwargs"] == {"note": "seen"}


def test_inspect_fails_only_when_every_row_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"foo": 1}, {"messages": [{"role": "user", "content": "?"}]}])
    done = swift("inspect", "--model", tiny_folder, "--dataset", rows, "--json")
    assert (done.code, done.error) == (1, "all 2 rows are refused")
    assert lines(done)[1] == {
        "row": 1, "refused": "the row has no trainable token: no assistant message with content, or train: false on all",
    }  # fmt: skip


def test_inspect_of_plain_texts(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("one line\n", encoding="utf-8")
    command = ["inspect", "--model", tiny_folder, "--dataset", tmp_path / "texts.txt", "--json"]
    (shown,) = lines(swift(*command, "--trainer", "pt").ok())
    assert (shown["text"], shown["trained"], shown["tokens"]) == ("one line", [[0, 8]], 9)


# --- config -----------------------------------------------------------------------------------------------------------


def test_config_show_fills_in_every_default(tiny_folder: Path) -> None:
    shown = swift("config", "show", "--model", tiny_folder, "tuner.rank=4", "trainer.name=pt").ok().out
    tree = yaml.safe_load(shown)
    assert (tree["model"]["name"], tree["tuner"]["rank"], tree["tuner"]["alpha"]) == (str(tiny_folder), 4, 16.0)
    assert (tree["trainer"]["name"], tree["trainer"]["overflow"], tree["seed"]) == ("pt", "split", 42)
    assert swift("config", "show", "--model", tiny_folder, "tuner.rank=4", "trainer.name=pt", "--json").ok().json() == tree
    done = swift("config", "show", "tuner.rnak=4")
    assert (done.code, done.error) == (2, "tuner.lora: unknown option 'rnak'. Did you mean: rank?")


def test_config_schema() -> None:
    whole = swift("config", "schema").ok().json()
    assert whole["seed"] == {"type": "whole number", "default": 42, "help": "seed of every random generator"}
    assert whole["bad_rows"]["type"] == "one of stop, skip"
    assert {"model", "dataset", "output", "seed", "tuner", "trainer", "backend", "engine", "quantizer"} <= set(whole)
    lora = swift("config", "schema", "tuner:lora").ok().json()
    assert {"rank", "alpha", "dropout", "targets"} <= set(lora)
    assert lora["rank"] == {
        "type": "whole number",
        "default": 8,
        "help": "rank of the update; higher learns more and takes more memory",
    }
    trainer = swift("config", "schema", "trainer:sft").ok().json()
    names = (
        "epochs max_steps batch_size batch_tokens accumulate learning_rate schedule warmup weight_decay clip max_length "
        "overflow packing eval_every save_every resume"
    )
    assert set(names.split()) <= set(trainer)
    assert {"device", "precision", "processes"} <= set(swift("config", "schema", "backend:torch").ok().json())
    assert {"bits", "group_size"} <= set(swift("config", "schema", "quantizer:hqq").ok().json())
    for wrong in ("tuner:lroa", "tunr:lora", "tuner"):
        assert swift("config", "schema", wrong).code == 2


# --- what is here -----------------------------------------------------------------------------------------------------


def test_doctor() -> None:
    import torch

    shown = swift("doctor", "--json").ok().json()
    assert (shown["swift-core"], shown["libraries"]["torch"].split("+")[0]) == (__version__, torch.__version__.split("+")[0])
    assert shown["plugins"]["swift-plugin-lora"] == __version__
    assert shown["problems"] == []
    assert shown["device"]["device"].startswith(("cpu", "cuda"))
    text = swift("doctor").ok().out
    assert f"swift-core {__version__}, Python 3." in text
    assert text.endswith("no problem found\n")


def test_doctor_says_what_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIFT_DISABLE_PLUGINS", "hqq")
    problem = f"swift-plugin-hqq {__version__}: DISABLED: switched off by SWIFT_DISABLE_PLUGINS"
    assert swift("doctor", "--json").ok().json()["problems"] == [problem]
    assert f"problem: {problem}\n1 problems found" in swift("doctor").ok().out


def test_models_show(tiny_folder: Path, tmp_path: Path) -> None:
    shown = swift("models", "show", tiny_folder, "--json").ok().json()
    assert {"id", "family", "architecture", "template", "capabilities", "folder"} <= set(shown)
    assert (shown["architecture"], shown["template"], shown["folder"]) == ("LlamaForCausalLM", "checkpoint", str(tiny_folder))
    assert (shown["adapter"], shown["quantization"]) == (None, None)
    rows = write_rows(tmp_path / "rows.jsonl", [chat_row("Hi", "Yes.")])
    swift("train", "--model", tiny_folder, "--dataset", rows, "--output", tmp_path / "run", THREADS).ok()
    trained = swift("models", "show", tmp_path / "run", "--json").ok().json()
    assert Path(trained["adapter"]).resolve() == checkpoint(tmp_path / "run").resolve()
    assert trained["folder"] == str(tiny_folder)
    hub = swift("models", "show", "somebody/something", "--json").ok().json()
    assert (hub["id"], hub["folder"], hub["architecture"]) == ("somebody/something", None, None)


def test_no_command() -> None:
    done = swift("trian")
    assert (done.code, done.error) == (2, "no command 'trian'. Did you mean: train, trainers? See swift-core --help")
    assert swift("--version").ok().out == f"swift-core {__version__}\n"
