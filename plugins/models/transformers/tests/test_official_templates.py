"""Official chat templates and real tokenizers: the text and the tokens are transformers' own, the mask is exact.

`official_turns.py` works out what is to be trained, `official_oracle.py` compares, `official_rows.py` has the rows. Each
template is tried with all of them and with random ones, and the oracle itself with faults that it must find.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from swift_core.config import build_options
from swift_core.types import Sample
from swift_plugin_transformers import hooks
from swift_plugin_transformers.config import ChatTemplateConfig
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent))
from official_oracle import Fault, check_row, check_sample, check_samples, demand
from official_rows import FINE, HELLO, HI, TOOLS, WEATHER, Row, random_rows, says, shapes, user
from official_turns import ENDS, MARKER, Renderer, wanted

FIXTURES = Path(__file__).parents[5] / "shared" / "fixtures"
SHAPES = shapes()
TOKENIZERS = ("qwen3", "llama3_1", "deepseek_v3")
# Two rows in every other tokenizer, so that each template meets each way of cutting text into tokens.
FEW = ("unicode", "calls-two-rounds")
# What a template cannot do without: variables that its maker's own code hands over.
NEEDED = {"fireworks-ai-llama-3-firefunction-v2": {"functions": "[]", "datetime": "1 May 2024"}}


def tokenizer_of(name: str) -> str:
    """The tokenizer nearest to the template's own. Templates that write a first token need one that has it."""
    if "deepseek" in name:
        return "deepseek_v3"
    source = file_of(name).read_text(encoding="utf-8")
    return "llama3_1" if "bos_token" in source and "<seed:bos>" not in source else "qwen3"


def file_of(name: str) -> Path:
    file = FIXTURES / "chat-templates" / f"{name}.jinja"
    if not file.is_file():
        pytest.skip(f"needs the fixture {file}")
    return file


@cache
def load_tokenizer(name: str) -> Any:
    folder = FIXTURES / "tokenizers" / name
    if not folder.is_dir():
        pytest.skip(f"needs the fixture {folder}")
    return AutoTokenizer.from_pretrained(folder)


@cache
def pair(name: str, tokenizer: str | None = None) -> tuple[Renderer, Any]:
    """transformers' rendering of a template, and the template under test made as a run makes it."""
    file, processor = file_of(name), load_tokenizer(tokenizer or tokenizer_of(name))
    config = build_options(ChatTemplateConfig, {"file": str(file), "kwargs": NEEDED.get(name, {})}, "template.checkpoint")
    template = hooks.swift_make_template("checkpoint", processor, config)
    return Renderer(name, processor, file.read_text(encoding="utf-8")), template


def check(name: str, row: Row, tokenizer: str | None = None) -> list[Sample]:
    renderer, template = pair(name, tokenizer)
    return check_row(renderer, template, copy.deepcopy(row), NEEDED.get(name))


def check_all(name: str, rows: dict[str, Row], tokenizer: str | None = None) -> None:
    """Check every row, and name all that fail."""
    faults = []
    for label, row in rows.items():
        try:
            check(name, row, tokenizer)
        except Fault as fault:
            faults.append(f"{label}: {fault}")
    assert not faults, f"{len(faults)} of {len(rows)} rows of {name}:\n" + "\n".join(faults)


def test_every_fixture_is_in_the_table() -> None:
    folder = FIXTURES / "chat-templates"
    if not folder.is_dir():
        pytest.skip(f"needs the fixtures {folder}")
    assert sorted(ENDS) == sorted(file.stem for file in folder.glob("*.jinja"))
    assert len(ENDS) == 29


@pytest.mark.parametrize("name", ENDS)
def test_the_table_says_what_follows_any_answer(name: str) -> None:
    """The end of the turn follows two different answers alike, and where the table has none, no marker does."""
    renderer, _ = pair(name)
    tails = set()
    for words in ("Zq one", "7x two"):
        row = [user("?"), says(words), user("?"), says(words)]
        text = renderer.text(row, TOOLS, NEEDED.get(name, {}))
        tails.add(text.rpartition(words)[2])
    (tail,) = tails
    end = renderer.end(says("?"))
    assert (end in tail) if end else not MARKER.search(tail)


@pytest.mark.parametrize("name", ENDS)
def test_every_shape_of_row(name: str) -> None:
    check_all(name, SHAPES)


@pytest.mark.parametrize("name", ENDS)
def test_random_rows(name: str) -> None:
    check_all(name, {f"random {n}": row for n, row in enumerate(random_rows(20, 20))})


@pytest.mark.parametrize("name", ENDS)
def test_other_tokenizers(name: str) -> None:
    for tokenizer in TOKENIZERS:
        if tokenizer != tokenizer_of(name):
            check_all(name, {label: SHAPES[label] for label in FEW}, tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", ENDS)
def test_every_row_with_every_tokenizer(name: str, tokenizer: str) -> None:
    check_all(name, {**SHAPES, **{f"random {n}": row for n, row in enumerate(random_rows(7, 200))}}, tokenizer)


# Templates that must not refuse these: an oracle that only ever sees refusals would find nothing.
WANTS_TOOLS = {"NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use", "NousResearch-Hermes-3-Llama-3.1-8B-tool_use"}
TAKES_CALLS = sorted(
    set(ENDS)
    - {"HuggingFaceTB-SmolLM3-3B", "LFM2-8B-A1B", "google-gemma-2-2b-it", "microsoft-Phi-3.5-mini-instruct"}  # leave calls out
    - {"Kimi-K2-Instruct"}  # appends to a list, which transformers' sandbox forbids
    - {"deepseek-ai-DeepSeek-R1-Distill-Llama-8B"}  # looks for a content of None, which transformers takes away
)


@pytest.mark.parametrize("name", ENDS)
def test_plain_rows_are_accepted(name: str) -> None:
    for label in ("one", "two", "four", "same-words", "long", "unicode", "untrained-first"):
        row = {**SHAPES[label], "tools": TOOLS} if name in WANTS_TOOLS else SHAPES[label]
        samples = check(name, row)
        assert sorted(turn for sample in samples for turn in sample.turns) == wanted(row["messages"]), label
        assert all(sample.trained_tokens for sample in samples), label


@pytest.mark.parametrize("name", TAKES_CALLS)
def test_tool_rows_are_accepted(name: str) -> None:
    samples = check(name, SHAPES["call-answer"])
    assert sorted(turn for sample in samples for turn in sample.turns) == [1, 3]


def template_of(tokenizer: Any) -> Any:
    config = build_options(ChatTemplateConfig, {}, "template.checkpoint")
    return hooks.swift_make_template("checkpoint", tokenizer, config)


@pytest.mark.parametrize(("tokenizer", "name"), [("qwen3", "Qwen-Qwen3-0.6B"), ("deepseek_v3", "deepseek-ai-DeepSeek-V3.1")])
def test_a_checkpoints_own_template(tokenizer: str, name: str) -> None:
    processor = load_tokenizer(tokenizer)
    assert processor.chat_template
    renderer, template = Renderer(name, processor, None), template_of(processor)
    for label in ("four", "system-two", "unicode", "thinks-first", "switch-False"):
        check_row(renderer, template, copy.deepcopy(SHAPES[label]))


def test_named_templates_are_chosen_as_inference_chooses_them() -> None:
    """transformers takes the variant `tool_use` for a row with tools, and `default` for any other."""
    processor = copy.deepcopy(load_tokenizer("llama3_1"))
    names = {"default": "Qwen-Qwen2.5-7B-Instruct", "tool_use": "NousResearch-Hermes-3-Llama-3.1-8B-tool_use"}
    processor.chat_template = {variant: file_of(name).read_text(encoding="utf-8") for variant, name in names.items()}
    renderer, template = Renderer(names["default"], processor, None), template_of(processor)
    (plain,) = check_row(renderer, template, copy.deepcopy(SHAPES["two"]))
    (calls,) = check_row(renderer, template, copy.deepcopy(SHAPES["call-answer"]))
    assert plain.text.startswith("<|im_start|>system\nYou are Qwen")
    assert calls.text.startswith("<|begin_of_text|><|im_start|>system\nYou are a function calling AI model")


# --- faults: each must be found by the oracle, wherever it is put


FAULTY = ("Qwen-Qwen3-0.6B", "meta-llama-Llama-3.1-8B-Instruct", "openai-gpt-oss-120b", "deepseek-ai-DeepSeek-V3.1", "GLM-4.6")
ROW: Row = {"messages": [HELLO, HI, user("And now?"), says("Still me.")]}


def sound(name: str) -> tuple[Renderer, list[Sample]]:
    """Samples in which the oracle finds nothing."""
    renderer, template = pair(name)
    samples = template.encode(ROW)
    check_samples(renderer, ROW, samples, {})
    return renderer, copy.deepcopy(samples)


def trained_at(sample: Sample) -> list[int]:
    return [index for index, weight in enumerate(sample.weights) if weight]


@pytest.mark.parametrize("name", FAULTY)
@pytest.mark.parametrize("shift", [-1, 1])
def test_fault_a_mask_shifted_by_one(name: str, shift: int) -> None:
    renderer, samples = sound(name)
    for sample in samples:
        tokens, characters = copy.deepcopy(sample), copy.deepcopy(sample)
        tokens.weights = sample.weights[-shift:] + sample.weights[:-shift]
        with pytest.raises(Fault, match="has weight"):
            check_sample(renderer, ROW, tokens)
        characters.spans = [(start + shift, end + shift) for start, end in sample.spans]
        with pytest.raises(Fault, match=r"starts at|ends at|ends with"):
            check_sample(renderer, ROW, characters)


@pytest.mark.parametrize("name", FAULTY)
def test_fault_a_mask_of_the_whole_text_or_of_the_prompt(name: str) -> None:
    renderer, samples = sound(name)
    for sample in samples:
        everything, prompt = copy.deepcopy(sample), copy.deepcopy(sample)
        everything.weights = [1.0] * len(sample.weights)
        prompt.weights = [1.0 - weight for weight in sample.weights]
        for faulty in (everything, prompt):
            with pytest.raises(Fault, match="has weight"):
                check_sample(renderer, ROW, faulty)


@pytest.mark.parametrize("name", FAULTY)
def test_fault_an_end_token_that_is_dropped(name: str) -> None:
    renderer, samples = sound(name)
    for sample in samples:
        last = trained_at(sample)[-1]
        untrained, shortened, cut = (copy.deepcopy(sample) for _ in range(3))
        untrained.weights[last] = 0.0
        with pytest.raises(Fault, match=r"has weight 0\.0, not 1\.0"):
            check_sample(renderer, ROW, untrained)
        end = renderer.tokenizer.decode([sample.input_ids[last]])
        start, stop = shortened.spans[-1]
        shortened.spans[-1] = (start, stop - len(end))
        with pytest.raises(Fault, match="ends "):
            check_sample(renderer, ROW, shortened)
        del cut.input_ids[last], cut.weights[last]
        with pytest.raises(Fault, match="the tokens are not those"):
            check_sample(renderer, ROW, cut)


@pytest.mark.parametrize("name", ["meta-llama-Llama-3.1-8B-Instruct", "deepseek-ai-DeepSeek-V3.1", "google-gemma-2-2b-it"])
def test_fault_a_first_token_that_is_doubled(name: str) -> None:
    renderer, samples = sound(name)
    for sample in samples:
        ids, text = copy.deepcopy(sample), copy.deepcopy(sample)
        first = renderer.tokenizer.bos_token_id
        assert sample.input_ids[0] == first != sample.input_ids[1]
        ids.input_ids, ids.weights = [first, *sample.input_ids], [0.0, *sample.weights]
        with pytest.raises(Fault, match="the first token is doubled"):
            check_sample(renderer, ROW, ids)
        text.text = renderer.tokenizer.bos_token + sample.text
        with pytest.raises(Fault, match="no rendering of the row has this text"):
            check_sample(renderer, ROW, text)


def test_fault_a_turn_that_is_lost_or_trained_twice() -> None:
    renderer, samples = sound("meta-llama-Llama-3.1-8B-Instruct")
    (sample,) = samples
    lost = copy.deepcopy(sample)
    lost.turns, lost.spans = lost.turns[:1], lost.spans[:1]
    for faulty in ([lost], [sample, lost], [], [sample, sample]):
        with pytest.raises(Fault, match=r"trained \["):
            check_samples(renderer, ROW, faulty, {})


@pytest.mark.parametrize("name", ["Qwen-Qwen3-0.6B", "GLM-4.6"])
def test_fault_an_empty_thought_that_is_trained(name: str) -> None:
    """A sample rendered with thinking on, whose answer brings the template's empty thought along."""
    renderer, samples = sound(name)
    row: Row = {"messages": ROW["messages"][:2]}
    text = renderer.text(row["messages"], None, {})
    sample = copy.deepcopy(samples[0])
    start = text.index("<think>")
    sample.text, sample.kwargs, sample.turns, sample.appended = text, {}, [1], None
    sample.input_ids = renderer.ids(row["messages"], None, {})
    sample.spans = [(start, len(text.rstrip()))]
    with pytest.raises(Fault, match="starts at"):
        check_sample(renderer, row, sample)


def check_batch(samples: list[Sample], batch: Any, pad: int) -> None:
    """Each sample's tokens stand where attention looks, and nothing but its weighted tokens reaches the loss."""
    for row, sample in enumerate(samples):
        seen = batch.inputs["attention_mask"][row].bool()
        demand(batch.inputs["input_ids"][row][seen].tolist() == sample.input_ids, "attention sees padding, or misses a token")
        weights = batch.weights[row]
        demand(weights[~seen].eq(0).all(), "padding reaches the loss")
        demand(weights[seen].tolist() == sample.weights, "weights have moved")
        demand(batch.labels[row][seen].tolist() == sample.input_ids, "labels are not the tokens")
        demand(batch.inputs["input_ids"][row][~seen].eq(pad).all(), "padding is another token")
    demand(abs(float(batch.weights.sum()) - sum(sum(sample.weights) for sample in samples)) < 1e-6, "the sum of weights")
    demand(abs(batch.weight - float(batch.weights.sum())) < 1e-6, "the batch's weight is not that of its tokens")
    demand(batch.trained_tokens == sum(sample.trained_tokens for sample in samples), "the count of trained tokens")


def test_fault_padding_that_reaches_the_loss() -> None:
    _, template = pair("Qwen-Qwen3-0.6B")
    rows: list[Row] = [ROW, SHAPES["long"], {"messages": [user("?"), says("No.")]}]
    samples = [sample for row in rows for sample in template.encode(row)]
    assert len({len(sample.input_ids) for sample in samples}) > 1
    batch, pad = template.collate(samples), template.tokenizer.pad_token_id
    check_batch(samples, batch, pad)
    padding = batch.inputs["attention_mask"].eq(0).nonzero().tolist()
    assert padding
    for row, column in (padding[0], padding[-1]):
        trained, seen = copy.deepcopy(batch), copy.deepcopy(batch)
        trained.weights[row, column] = 1.0
        with pytest.raises(Fault, match="padding reaches the loss"):
            check_batch(samples, trained, pad)
        seen.inputs["attention_mask"][row, column] = 1
        with pytest.raises(Fault, match="attention sees padding"):
            check_batch(samples, seen, pad)
    counted = copy.deepcopy(batch)
    counted.weight += 1
    with pytest.raises(Fault, match="the batch's weight"):
        check_batch(samples, counted, pad)


def test_fault_a_refusal_without_need() -> None:
    renderer, _ = pair("Qwen-Qwen2.5-7B-Instruct")

    class Refuses:
        def encode(self, row: Row) -> list[Sample]:
            raise ValueError("the chat template leaves out what the assistant says: 'Sunny.'")

    calls: Row = {"messages": [HELLO, says(None, tool_calls=[WEATHER]), FINE, says("Sunny.")], "tools": TOOLS}
    for row in (ROW, calls):
        with pytest.raises(Fault, match="refused without need"):
            check_row(renderer, Refuses(), row)


# --- the command


def encode(template: Any, row: Row) -> tuple[list[Sample], str]:
    try:
        return template.encode(row), ""
    except ValueError as err:
        return [], str(err)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("Qwen-Qwen3-0.6B", "openai-gpt-oss-120b")]


@pytest.mark.parametrize("name", ["GLM-4.6", *SLOW])
def test_inspect_prints_what_the_oracle_expects(name: str, tmp_path: Path) -> None:
    renderer, template = pair(name, "qwen3")
    rows = [SHAPES[label] for label in ("two", "call-answer", "thinks-first", "no-answer", "unicode", "untrained-first")]
    data, model = tmp_path / "rows.jsonl", tmp_path / "model"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    model.mkdir()
    (model / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}')
    renderer.tokenizer.save_pretrained(model)
    command = [Path(sys.executable).with_name("swift-core"), "inspect", "--model", model, "--template", file_of(name)]
    done = subprocess.run([*command, "--dataset", data, "--json"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["row"] for line in lines} == set(range(len(rows)))
    for number, row in enumerate(rows):
        mine = [line for line in lines if line["row"] == number]
        expected, refusal = encode(template, row)
        if refusal:
            assert mine == [{"row": number, "refused": refusal}]
            continue
        assert [line["text"] for line in mine] == [sample.text for sample in expected]
        assert [line["turns"] for line in mine] == [sample.turns for sample in expected]
        assert [line["trained"] for line in mine] == [[list(span) for span in sample.spans] for sample in expected]
        assert [line["appended"] for line in mine] == [sample.appended for sample in expected]
        assert [line["kwargs"] for line in mine] == [sample.kwargs for sample in expected]
        assert [line["tokens"] for line in mine] == [len(sample.input_ids) for sample in expected]
        assert [line["trained_tokens"] for line in mine] == [sample.trained_tokens for sample in expected]
