"""The benchmarks' own arithmetic: logs read, rows compared, rates, memory of a process tree, operations counted by hand.

No peer is installed or run here. Log lines are as the tools print them.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def module(name: str) -> Any:
    return importlib.import_module(f"benchmarks.{name}")


MS_SWIFT = (
    " 50%|x| 1/2 [00:23<00:23, 23.04s/it]     {'loss': '1.173', 'grad_norm': '0.2463', 'learning_rate': '5e-05', "
    "'token_acc': '0.6987', 'epoch': '0.125', 'global_step/max_steps': '1/2', 'train_speed(s/it)': '23.05'}"
)
TRL = "{'loss': '1.617', 'grad_norm': '0.299', 'learning_rate': '0.0001', 'entropy': '1.52', 'num_tokens': '1189'}"
FACTORY = "{'loss': 1.734, 'grad_norm': 0.3186, 'learning_rate': 0.0001, 'epoch': 0.12}"
END = "{'train_runtime': '44.61', 'train_samples_per_second': '0.179', 'train_loss': '1.725', 'epoch': '0.25'}"


@pytest.mark.parametrize(
    ("name", "line", "loss"), [("ms_swift", MS_SWIFT, 1.173), ("trl", TRL, 1.617), ("llama_factory", FACTORY, 1.734)]
)
def test_a_peers_step_is_read_from_its_log(name: str, line: str, loss: float) -> None:
    tool = module(f"train.tools.{name}").TOOL
    step = tool.step(line, 7)
    assert (step.number, step.loss) == (7, loss)
    assert tool.step(END, 8) is None
    assert tool.begins("Train:   0%|          | 0/64 [00:00<?, ?it/s]")
    assert not tool.begins("Tokenizing train dataset:   0%|          | 0/32 [00:00<?, ? examples/s]")
    assert not tool.begins(line)


def test_swift_cores_step_is_read_from_its_log() -> None:
    tool = module("train.tools.swift_core").TOOL
    step = tool.step("step 12/64  loss 1.6160  lr 1.00e-04  50 tokens/s  0:15 left", 12)
    assert (step.number, step.loss) == (12, 1.616)
    assert tool.begins("training 2,442,240 of 136,957,248 parameters (1.78%) on cpu: 64 steps of 4 rows")
    assert tool.step("done: 2 steps in 31 s, train loss 1.5175, 54 tokens/s, peak memory 3.31 GiB", 3) is None
    assert not tool.begins("data: 32 rows, 32 samples, 7008 tokens, 5546 trained")


def test_the_line_that_swift_core_prints_is_the_one_that_is_read() -> None:
    """Against the printer itself, so that a new wording cannot make the benchmark blind."""
    from swift_core.events import describe_step

    data = {"step": 3, "steps": 64, "loss": 1.25, "learning_rate": 1e-4, "tokens_per_second": 50.0, "seconds_left": 15.0}
    step = module("train.tools.swift_core").TOOL.step(describe_step(data), 3)
    assert (step.number, step.loss) == (3, 1.25)


def test_a_variant_has_more_words_and_the_same_environment(tmp_path: Path) -> None:
    tool, job = module("train.tools.swift_core").TOOL, module("train.job").Job(Path("model"), Path("rows.jsonl"), rank=3)
    words = tool.train(job, tmp_path / "run").words
    assert "tuner.rank=3" in words
    assert words[words.index("--output") + 1] == str(tmp_path / "run")
    variant = tool.varied(["trainer.packing=true"])
    assert (variant.name, variant.environment) == ("swift-core trainer.packing=true", "swift-core")
    assert variant.train(job, tmp_path / "run").words == [*words, "trainer.packing=true"]
    assert module("train.run").folder_of("trl --dtype float32", 1) == "trl-dtype-float32-1"


def measured(*lines: tuple[float, str]) -> Any:
    measure = module("train.measure")
    return measure.Measured(0, 30.0, 5 * 2**20, 40.0, tuple(measure.Line(*line) for line in lines))


def test_the_last_empty_bar_before_the_first_loss_begins_the_training() -> None:
    trl, results = module("train.tools.trl").TOOL, module("train.results")
    loading, training, other = (f"x 0/{count} [00:00<?, ?it/s]" for count in (272, 2, 9))
    found = results.result(trl, 0, measured((1.0, loading), (4.0, training), (9.0, TRL), (9.5, other), (14.0, TRL)))
    assert (found.begin, found.first_step, found.last_step, found.training) == (4.0, 9.0, 14.0, 10.0)
    assert (found.steps, found.train_loss, found.seconds) == (2, 1.617, 30.0)


def test_a_log_without_a_step_is_an_error_that_shows_its_end() -> None:
    with pytest.raises(ValueError, match=r"trl: no step in its log \(exit status 0; last line: ValueError: no bf16\)"):
        module("train.results").result(module("train.tools.trl").TOOL, 0, measured((1.0, "x"), (2.0, "ValueError: no bf16")))


def test_rows_are_compared_whatever_their_order() -> None:
    compare = module("train.results").compare
    one, two = {"ids": [1, 2, 3], "labels": [-100, 2, -100]}, {"ids": [4, 5], "labels": [-100, 5]}
    same = compare([one, two], [two, one])
    assert (same.rows, same.tokens, same.trained, same.differing, same.difference) == (2, 5, 2, 0, "the same")
    more = compare([one, two], [{"ids": [1, 2, 3], "labels": [-100, 2, 3]}, two])
    assert (more.trained, more.differing, more.difference) == (3, 1, "1 rows train 1 tokens more and 0 fewer")
    other = compare([one, two], [{"ids": [9], "labels": [9]}])
    assert other.difference == "1 rows instead of 2; 1 rows with other tokens"


def runs() -> list[Any]:
    result = module("train.results").Result
    return [
        result("swift-core", 0, 0, 64, 5.0, 6.0, 105.0, 110.0, 200.0, 2**30, 1.5, 1.40),
        result("trl", 0, 0, 64, 10.0, 14.0, 210.0, 220.0, 400.0, 2**31, 1.5, 1.41),
        result("trl", 1, 0, 64, 10.0, 14.0, 410.0, 420.0, 400.0, 2**31, 1.5, 1.43),
    ]


def test_the_summary_takes_medians_and_the_table_shows_them() -> None:
    results = module("train.results")
    counts = {name: results.Counts(256, 50_000, 30_000, 0, "the same") for name in ("swift-core", "trl")}
    rows = results.summary(runs(), counts, batch=4, flops=2e13)
    assert [row["tool"] for row in rows] == ["swift-core", "trl"]
    assert rows[0]["trained_per_second"] == 300
    assert rows[0]["tokens_per_second"] == 500
    assert rows[0]["gflops_per_second"] == pytest.approx(200)
    assert rows[1]["trained_per_second"] == 100
    assert rows[1]["held_loss"] == pytest.approx(1.42)
    assert rows[1]["runs"] == 2
    table = results.table(rows).splitlines()
    assert table[2] == "| swift-core | 300.0 | 500.0 | 110.0 | 5.0 | 6.0 | 1024 | 1.4000 | 30,000 | 200 |"
    assert results.ratios(rows) == [
        "swift-core to trl: 3.00 x trained tokens/s, 34% of the wall time, 50% of the peak memory, held-out loss -0.0200"
    ]


def test_a_run_that_stops_early_counts_its_part_of_the_tokens() -> None:
    results = module("train.results")
    short = results.Result("trl", 0, 0, 16, 0.0, 1.0, 10.0, 12.0, 20.0, 1, 1.5)
    (row,) = results.summary([short], {"trl": results.Counts(256, 40_000, 20_000, 0, "")}, batch=4)
    assert row["trained_per_second"] == 500
    assert row["held_loss"] is None
    assert "| - |" in results.table([row])


def test_operations_are_those_counted_by_hand() -> None:
    machine = module("machine")
    shapes = machine.Shapes(layers=2, hidden=4, inner=8, key_value=2, vocabulary=10, rank=1)
    # a layer: q 4x4, o 4x4, k 4x2, v 4x2, gate 4x8, up 4x8, down 8x4 = 16+16+8+8+32+32+32
    assert shapes.linear() == 2 * 144
    # A and B: 4+4, 4+4, 4+2, 4+2, 4+8, 4+8, 8+4
    assert shapes.adapter() == 2 * 64
    # one row of 3 tokens, 2 of them trained
    assert machine.lora_flops(shapes, 3, 2, 9) == 4 * 288 * 3 + 4 * 4 * 10 * 2 + 6 * 128 * 3 + 6 * 2 * 4 * 9


def test_shapes_come_from_a_checkpoints_config() -> None:
    config = {
        "num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152,
    }  # fmt: skip
    shapes = module("machine").shapes_of(config, 8)
    assert shapes.linear() == 106_168_320
    assert shapes.adapter() == 2_442_240  # what the trainers print for rank 8


def test_alpaca_rows_become_messages_with_the_templates_system_message(tmp_path: Path) -> None:
    job = module("train.job")
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Hi", "output": "Ho"}]))
    first, second = job.read_rows(file)
    assert [message["content"] for message in first["messages"]] == [job.SYSTEM, "Add.\n1 2", "3"]
    assert [message["role"] for message in second["messages"]] == ["system", "user", "assistant"]
    lines = job.write_rows([first, second], tmp_path / "rows.jsonl")
    assert job.read_rows(lines) == [first, second]
    with pytest.raises(ValueError, match=r"row 0: no 'instruction'; keys found: question"):
        job.standard_row({"question": "?"}, 0)


def test_synthetic_rows_differ_and_repeat_with_the_seed() -> None:
    job = module("train.job")
    source = [job.standard_row({"instruction": "Say.", "output": "One. Two. Three."}, 0)]
    made = job.synthetic_rows(50, source)
    assert len({row["messages"][1]["content"] for row in made}) == 50
    assert made == job.synthetic_rows(50, source)
    assert made != job.synthetic_rows(50, source, seed=1)


CHILD = "import sys, time; data = bytearray(60 << 20); print('child', flush=True); time.sleep(0.6)"
PARENT = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}])
sys.stderr.write("bar 0/2\\rbar 1/2")
sys.stderr.flush()
time.sleep(0.3)
print("\\nlast", flush=True)
child.wait()
sys.exit(3)
"""


def test_a_command_is_measured_with_its_children_and_its_log(tmp_path: Path) -> None:
    measure = module("train.measure")
    log = tmp_path / "log.txt"
    found = measure.run([sys.executable, "-c", PARENT], log, every=0.02)
    assert found.status == 3
    assert 0.5 < found.seconds < 30
    assert 60 << 20 < found.peak_bytes < 400 << 20
    texts = [line.text for line in found.lines]
    assert (texts[0], texts[-1]) == ("bar 0/2", "last")
    assert "child" in "".join(texts)
    assert found.lines[0].seconds <= found.lines[-1].seconds < found.seconds
    assert b"bar 0/2\rbar 1/2" in log.read_bytes()


def test_a_bars_line_has_the_time_at_which_it_was_drawn(tmp_path: Path) -> None:
    drawn = "import sys, time; sys.stderr.write('0/2'); sys.stderr.flush(); time.sleep(0.5); sys.stderr.write('\\r1/2\\n')"
    first, second = module("train.measure").run([sys.executable, "-c", drawn], tmp_path / "log.txt").lines
    assert second.seconds - first.seconds > 0.4


def test_a_command_over_its_limit_is_ended(tmp_path: Path) -> None:
    found = module("train.measure").run([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log.txt", limit=0.3)
    assert found.status == -9
    assert found.seconds < 10


def test_the_requirements_pin_every_version() -> None:
    environments = module("train.environments")
    for tool in environments.TOOLS.values():
        if tool.name == "swift-core":
            continue
        lines = tool.requirements.read_text(encoding="utf-8").splitlines()
        assert all(line.count("==") == 1 for line in lines)
        pins = dict(line.split("==") for line in lines)
        assert pins["torch"] == "2.13.0"
        own = {"ms-swift": "ms_swift", "trl": "trl", "llama-factory": "llamafactory"}[tool.name]
        assert pins[own] == tool.version


def test_growth_with_length_is_given_as_an_exponent() -> None:
    length = module("train.length")
    table = length.table([length.Length(512, 2.0, 2**30), length.Length(1024, 8.0, 2**30)]).splitlines()
    assert table[2] == "| 512 | 2.00 | 256 | 1,024 |  |"
    assert table[3] == "| 1,024 | 8.00 | 128 | 1,024 | 2.00 |"


def test_the_rate_of_preparing_leaves_the_start_out() -> None:
    prepare = module("train.prepare")
    prepared = prepare.Prepared("trl", 20_000, 50.0, 2**31, 200, 10.4, 2**30)
    assert prepared.rate == pytest.approx(500)
    assert prepare.table([prepared]).splitlines()[2] == "| trl | 500 | 50.0 | 2,048 | 1,024 |"
    noise = prepare.Prepared("trl", 300, 10.0, 2**31, 200, 10.4, 2**30)
    assert noise.rate is None
    assert prepare.table([noise]).splitlines()[2].startswith("| trl | - |")


def test_rows_of_a_batch_lose_their_padding() -> None:
    import torch

    rows_of = importlib.import_module("benchmarks.train.inside.record_batches").rows_of
    wanted = [([5, 6, 7], [-100, 6, 7]), ([8, 2], [-100, 2])]
    padded = {
        "input_ids": torch.tensor([[5, 6, 7], [8, 2, 2]]), "labels": torch.tensor([[-100, 6, 7], [-100, 2, -100]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    }  # fmt: skip
    flat = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 2]]), "labels": torch.tensor([[-100, 6, 7, -100, 2]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1]]),
    }  # fmt: skip
    assert list(rows_of(padded)) == wanted
    assert list(rows_of(flat)) == wanted


def test_the_reference_trains_the_answer_and_its_end_marker() -> None:
    reference = importlib.import_module("benchmarks.train.inside.reference")
    from swift_plugin_transformers.testing import make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    found = reference.from_row(
        tokenizer, {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    )
    trained = [token for token in found["labels"] if token != -100]
    assert tokenizer.decode(trained) == "Ho<|im_end|>"
    assert [token for token, label in zip(found["ids"], found["labels"], strict=True) if label != -100] == trained
    text = tokenizer.decode(found["ids"])
    line = {
        "row": 0,
        "text": text,
        "trained": [[text.index("Ho"), len(text) - 1]],
        "tokens": len(found["ids"]),
        "trained_tokens": len(trained),
    }
    assert reference.from_inspected(tokenizer, line) == found
    with pytest.raises(ValueError, match="row 0: inspect says"):
        reference.from_inspected(tokenizer, {**line, "trained_tokens": 1})


def test_the_judges_loss_is_the_mean_over_all_trained_tokens() -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    rows = [{"ids": [3, 4, 5, 6], "labels": [-100, -100, 5, 6]}, {"ids": [7, 8, 9], "labels": [-100, -100, 9]}]
    losses = []  # the library's own means, of 2 tokens and of 1
    with torch.no_grad():
        for row in rows:
            losses.append(float(model(input_ids=torch.tensor([row["ids"]]), labels=torch.tensor([row["labels"]])).loss))
    found = importlib.import_module("benchmarks.train.inside.held_out").mean_loss(model, rows)
    assert found == pytest.approx((2 * losses[0] + losses[1]) / 3, rel=1e-5)
