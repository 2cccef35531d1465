"""The benchmark of DPO: its rows, that all tools get the same job, and the table. No peer is installed or run here."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def dpo(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.align.dpo")


def shared(*turns: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(turns)]


def test_a_pair_of_sharegpt(dpo: Any) -> None:
    row = {"conversations": shared("Hi"), "chosen": shared("", "Yes")[1], "rejected": shared("", "No")[1]}
    prompt, chosen, rejected = dpo.dpo_rows.pair(row)
    assert [message["role"] for message in prompt] == ["system", "user"]
    assert (chosen, rejected) == ({"role": "assistant", "content": "Yes"}, {"role": "assistant", "content": "No"})
    assert dpo.dpo_rows.pair({**row, "rejected": row["chosen"]}) is None
    assert dpo.dpo_rows.pair({**row, "conversations": shared("Hi", "Hello")}) is None


def test_rows_above_the_length_are_left_out(dpo: Any, tiny_folder: Path, tmp_path: Path, capsys: Any) -> None:
    rows = [
        {"conversations": shared("Hi"), "chosen": shared("", text)[1], "rejected": shared("", "No")[1]}
        for text in ("Yes", "Yes and " * 50, "Well")
    ]
    (tmp_path / "pairs.json").write_text(json.dumps(rows), encoding="utf-8")
    dpo.dpo_rows.main(str(tiny_folder), str(tmp_path / "pairs.json"), str(tmp_path), "5", "200")
    said = json.loads(capsys.readouterr().out)
    files = [(tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("messages", "prompts")]
    messages, prompts = ([json.loads(line) for line in file] for file in files)
    assert said["rows"] == len(messages) == len(prompts) == 2
    assert said["tokens"] == sum(row["length"] for row in prompts)
    assert [row["messages"][-1]["content"] for row in messages] == ["Yes", "Well"]
    assert [row["rejected_response"] for row in messages] == ["No", "No"]
    assert prompts[0]["prompt"] + prompts[0]["chosen"] == messages[0]["messages"]


def test_all_tools_get_the_same_job(dpo: Any, tmp_path: Path) -> None:
    for name in ("messages", "prompts"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    job = dpo.Job(tmp_path / "model", tmp_path, batch=3, rank=5, alpha=7, rate=2e-5, max_length=77, seed=9, limit=11)
    for name, train in dpo.TRAIN.items():
        words = " ".join(train(job, tmp_path / name).words).replace("=", " ").replace("_", " ").replace("-", " ")
        for told in ("batch size 3", "beta 0.1", "learning rate 2e 05", "max length 77", "seed 9", "max steps 11", "alpha 7"):
            assert told in words, (name, told)
        assert ("rank 5" in words) or ("lora r 5" in words), name


def test_the_table_takes_medians(dpo: Any) -> None:
    one = {"status": 0, "begin": 1.0, "first_step": 2.0, "seconds": 20.0, "processor_seconds": 1.0, "peak_bytes": 2**30}
    found = [
        dpo.Result(tool=tool, round=n, steps=2, last_step=1.0 + seconds, train_loss=0.6, **one)
        for n, seconds in enumerate((4.0, 8.0, 6.0))
        for tool in ("swift-core", "trl")
    ]
    lines = dpo.table(found, 4).splitlines()
    assert lines[2] == "| swift-core | 3.00 | 1.33 | 1,024 | 20.0 | 0.6000 |"
    assert len(lines) == 4
