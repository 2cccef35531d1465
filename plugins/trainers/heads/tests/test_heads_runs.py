"""Whole runs of models with a head: train, evaluate, save, load by the transformers library or peft, and infer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from swift_core.config import parse_config
from swift_core.errors import RequestError
from swift_core.training import train
from swift_plugin_transformers.testing import make_tokenizer, save_tiny

WORDS = {"good": ["fine", "warm", "kind", "glad"], "bad": ["cold", "grim", "mean", "sour"]}
TEXTS = [(f"the {a} {b} day", name) for name, words in WORDS.items() for a in words for b in words]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def run(model: Path, rows: str, output: Path, trainer: str, tuner: Any = "full", **more: Any) -> dict[str, Any]:
    settings = {"name": trainer, "epochs": 6, "batch_size": 8, "learning_rate": 3e-3, **more.pop("options", {})}
    model_options = more.pop("model_options", {})
    return train(parse_config({
        "model": {"name": str(model), **model_options}, "dataset": rows, "eval_dataset": rows, "output": str(output),
        "tuner": tuner, "trainer": settings, **{"backend": {"name": "torch", "device": "cpu"}, **more},
    }))  # fmt: skip


def infer(model: Path, rows: str, output: Path, *more: str) -> list[dict[str, Any]]:
    from swift_plugin_use.infer import infer as command

    result = CliRunner().invoke(command, ["--model", str(model), "--dataset", rows, "--output", str(output), *more])
    assert result.exit_code == 0, (result.output, result.exception)
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def save_bert(folder: Path) -> Path:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"cls_token": "<|im_start|>", "sep_token": "<|im_end|>"})
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=len(tokenizer),
        max_position_embeddings=256, pad_token_id=0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("models") / "bert")


def outputs_of(model: Any, tokenizer: Any, text: str) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**tokenizer(text, return_tensors="pt")).logits[0]


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_classes_are_learnt_and_the_folder_is_one_of_the_library(family: str, request: Any, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [{"text": text, "label": name} for text, name in TEXTS])
    with pytest.warns(UserWarning, match="its head for sequence_classification is new, drawn from the seed"):
        summary = run(
            request.getfixturevalue(family), rows, tmp_path / "run", "classify", model_options={"labels": ["good", "bad"]}
        )
    assert summary["eval_metrics"]["accuracy"] == 1.0
    assert summary["eval_metrics"]["macro_f1"] == 1.0
    folder = Path(summary["last"])
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert model.config.id2label == {0: "good", 1: "bad"}
    answers = infer(tmp_path / "run", rows, tmp_path / "answers.jsonl")
    assert [answer["label"] for answer in answers] == [answer["reference"] for answer in answers] == [n for _, n in TEXTS]
    shares = outputs_of(model, tokenizer, TEXTS[3][0]).softmax(-1)
    assert answers[3]["probabilities"]["good"] == pytest.approx(float(shares[0]), abs=1e-5)


def test_an_adapter_holds_its_head(llama: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    rows = write(tmp_path / "rows.jsonl", [{"text": text, "label": name} for text, name in TEXTS])
    summary = run(
        llama, rows, tmp_path / "run", "classify", {"name": "lora", "rank": 8}, model_options={"labels": ["good", "bad"]},
        options={"epochs": 8, "learning_rate": 1e-2},
    )  # fmt: skip
    assert summary["eval_metrics"]["accuracy"] == 1.0
    answers = infer(tmp_path / "run", rows, tmp_path / "answers.jsonl")
    assert [answer["label"] for answer in answers] == [name for _, name in TEXTS]
    base = transformers.AutoModelForSequenceClassification.from_pretrained(llama, num_labels=2, pad_token_id=0)
    model = peft.PeftModel.from_pretrained(base, summary["last"])
    shares = outputs_of(model, transformers.AutoTokenizer.from_pretrained(llama), TEXTS[5][0]).softmax(-1)
    assert answers[5]["probabilities"]["bad"] == pytest.approx(float(shares[1]), abs=1e-5)


def test_sets_of_classes_and_numbers(llama: Path, tmp_path: Path) -> None:
    rows = [{"text": text, "label": [name, "long"] if "kind" in text else [name]} for text, name in TEXTS]
    options = {"labels": ["good", "bad", "long"], "problem": "multi_label"}
    summary = run(
        llama, write(tmp_path / "sets.jsonl", rows), tmp_path / "sets", "classify", model_options=options,
        options={"epochs": 16},
    )  # fmt: skip
    assert summary["eval_metrics"]["accuracy"] == 1.0
    answers = infer(tmp_path / "sets", str(tmp_path / "sets.jsonl"), tmp_path / "a.jsonl")
    assert [set(answer["labels"]) for answer in answers] == [set(row["label"]) for row in rows]
    numbers = [{"text": text, "label": 1.5 if name == "good" else -0.5} for text, name in TEXTS]
    options = {"num_labels": 1, "problem": "regression"}
    file = write(tmp_path / "numbers.jsonl", numbers)
    summary = run(llama, file, tmp_path / "numbers", "classify", model_options=options)
    assert summary["eval_metrics"]["mse"] < 0.05
    assert summary["eval_metrics"]["pearson"] > 0.95
    answers = infer(tmp_path / "numbers", file, tmp_path / "b.jsonl")
    assert answers[0]["values"] == [pytest.approx(1.5, abs=0.5)]


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_words_are_tagged(family: str, request: Any, tmp_path: Path) -> None:
    rows = [{"text": text, "label": ["O", name, name, "O"]} for text, name in TEXTS]
    file = write(tmp_path / "rows.jsonl", rows)
    summary = run(
        request.getfixturevalue(family), file, tmp_path / "run", "tag", model_options={"labels": ["O", "good", "bad"]},
        options={"epochs": 10},
    )  # fmt: skip
    floor = 0.9 if family == "bert" else 0.6  # what comes first, of one letter, a decoder cannot tell: it does not look ahead
    assert summary["eval_metrics"]["token_f1"] > floor
    model = transformers.AutoModelForTokenClassification.from_pretrained(summary["last"])
    assert model.config.num_labels == 3
    answers = infer(tmp_path / "run", file, tmp_path / "answers.jsonl")
    first = {tag["start"]: tag["label"] for tag in answers[0]["tags"]}
    logits = outputs_of(model, transformers.AutoTokenizer.from_pretrained(summary["last"]), rows[0]["text"])
    offset = 1 if family == "bert" and len(logits) > len(rows[0]["text"]) else 0
    assert first[4] == model.config.id2label[int(logits[4 + offset].argmax())]


@pytest.mark.parametrize(("family", "tuner"), [("llama", "full"), ("bert", "full"), ("llama", "lora")])
def test_vectors_of_what_belongs_together_are_near(family: str, tuner: str, request: Any, tmp_path: Path) -> None:
    names = ["tea", "jam", "oak", "sun", "fog", "elk", "rye", "zinc"]
    rows = [{"query": f"where is {n}", "positive": f"{n} {n}", "negatives": [f"no {n}"]} for n in names]
    file = write(tmp_path / "rows.jsonl", rows)
    rate = 1e-2 if tuner == "lora" else 3e-3
    summary = run(
        request.getfixturevalue(family), file, tmp_path / "run", "embed", tuner, options={"epochs": 60, "learning_rate": rate}
    )
    assert summary["eval_metrics"]["accuracy"] >= 0.8
    assert summary["eval_metrics"]["mrr"] >= 0.9
    found = infer(tmp_path / "run", file, tmp_path / "vectors.jsonl")
    assert sum(x * x for x in found[0]["vector"]) == pytest.approx(1.0, abs=1e-4)
    assert len({len(answer["vector"]) for answer in found}) == 1


def test_pairs_with_a_degree(bert: Path, tmp_path: Path) -> None:
    rows = [{"query": a, "document": b, "label": float(x == y)} for a, x in TEXTS[::5] for b, y in TEXTS[::7]]
    summary = run(
        bert, write(tmp_path / "rows.jsonl", rows), tmp_path / "run", "embed",
        options={"batch_size": 16, "learning_rate": 1e-3, "epochs": 20},
    )  # fmt: skip
    assert summary["eval_metrics"]["pearson"] > 0.8


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_documents_are_ranked(family: str, request: Any, tmp_path: Path) -> None:
    rows = [
        {"query": name, "positive": text, "negatives": [TEXTS[(n + 16) % 32][0], TEXTS[(n + 19) % 32][0]]}
        for n, (text, name) in enumerate(TEXTS[:8] + TEXTS[16:24])
    ]
    rows = [{**row, "negatives": [t for t, n in TEXTS if n != row["query"]][:2]} for row in rows]
    file = write(tmp_path / "rows.jsonl", rows)
    summary = run(request.getfixturevalue(family), file, tmp_path / "run", "rerank", options={"epochs": 40})
    assert summary["eval_metrics"]["accuracy"] > 0.9
    asked = write(tmp_path / "ask.jsonl", [{"query": "bad", "documents": ["the cold grim day", "the warm kind day"]}])
    scores = infer(tmp_path / "run", asked, tmp_path / "scores.jsonl")[0]["scores"]
    assert scores[0] > scores[1]


def test_better_answers_get_a_higher_reward(llama: Path, tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "how was it"}, {"role": "assistant", "content": good}],
         "rejected": [{"role": "user", "content": "how was it"}, {"role": "assistant", "content": bad}]}
        for good, bad in zip(WORDS["good"] * 4, WORDS["bad"] * 4, strict=True)
    ]  # fmt: skip
    file = write(tmp_path / "rows.jsonl", rows)
    summary = run(llama, file, tmp_path / "run", "reward")
    assert summary["eval_metrics"]["accuracy"] == 1.0
    assert summary["eval_metrics"]["margin"] > 1.0
    score = infer(tmp_path / "run", file, tmp_path / "scores.jsonl")[0]["score"]
    folder = Path(summary["last"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    text = tokenizer.apply_chat_template(rows[0]["messages"], tokenize=False)
    assert score == pytest.approx(float(outputs_of(model, tokenizer, text)[0]), abs=1e-5)


@pytest.mark.parametrize(
    ("trainer", "row", "message", "options"),
    [
        ("classify", {"text": "a", "label": "good"}, "label 'good' is no known class; name the classes", {}),
        ("classify", {"text": "a", "label": 5}, "label 5 is not below the number of classes, 2", {"num_labels": 2}),
        ("classify", {"text": "a"}, "the row has no 'label'", {}),
        ("tag", {"text": "a b", "label": [0]}, "the row has 2 words and 1 labels", {"num_labels": 2}),
        ("embed", {"query": "a"}, "the row has no 'positive'", {}),
        ("rerank", {"query": "a", "positive": "b"}, "no 'negatives'", {}),
        ("reward", {"query": "a", "response": "b"}, "no 'rejected' conversation", {}),
        ("classify", {"text": "a", "label": 7}, "label 7: the model has 2 classes", {}),
    ],
)
def test_a_row_that_does_not_fit_is_named(
    trainer: str, row: dict[str, Any], message: str, options: dict[str, Any], llama: Path, tmp_path: Path
) -> None:
    file = write(tmp_path / "rows.jsonl", [row])
    with pytest.raises(RequestError, match=message) as caught:
        run(llama, file, tmp_path / "run", trainer, model_options=options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([["good"], ["bad"]], "labels are lists of classes: set model.problem=multi_label"),
        ([0.5, 1.5], "labels are numbers: set model.problem=regression"),
        ([1, [0]], "model.problem to what is meant"),
    ],
)
def test_a_problem_that_inference_would_not_know_is_asked_for(
    labels: list[Any], message: str, llama: Path, tmp_path: Path
) -> None:
    file = write(tmp_path / "rows.jsonl", [{"text": "a b", "label": label} for label in labels])
    with pytest.raises(RequestError, match=message):
        run(llama, file, tmp_path / "run", "classify", model_options={"labels": ["good", "bad"]})


def test_a_regression_has_one_number_and_no_talk(llama: Path, tmp_path: Path) -> None:
    from swift_plugin_use.chat import chat

    rows = write(tmp_path / "rows.jsonl", [{"text": text, "label": len(text)} for text, _ in TEXTS[:4]])
    options = {"epochs": 1, "learning_rate": 1e-4}
    run(llama, rows, tmp_path / "run", "classify", model_options={"problem": "regression"}, options=options)
    assert [len(answer["values"]) for answer in infer(tmp_path / "run", rows, tmp_path / "a.jsonl")] == [1] * 4
    failed = CliRunner().invoke(chat, ["--model", str(tmp_path / "run")], input="Hi\n")
    assert "does not generate text: it has a head; use swift-core infer" in str(failed.exception)


def test_sft_refuses_a_model_without_a_next_token(bert: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [{"text": "a b c"}])
    with pytest.raises(RequestError, match="is a masked language model: give it a head"):
        run(bert, file, tmp_path / "run", "pt")


def test_an_adapter_with_a_head_is_merged(llama: Path, tmp_path: Path) -> None:
    from swift_plugin_use.convert import export
    from swift_plugin_use.infer import infer as infer_command

    rows = write(tmp_path / "rows.jsonl", [{"text": text, "label": name} for text, name in TEXTS])
    run(llama, rows, tmp_path / "run", "classify", {"name": "lora", "rank": 8}, model_options={"labels": ["good", "bad"]})
    out = CliRunner().invoke(export, ["--model", str(tmp_path / "run"), "--output", str(tmp_path / "merged"), "--json"])
    assert out.exit_code == 0, (out.output, out.exception)
    assert json.loads(out.stdout[out.stdout.index("{") :])["gap"] < 1e-4
    before = infer(tmp_path / "run", rows, tmp_path / "a.jsonl")
    after = infer(tmp_path / "merged", rows, tmp_path / "b.jsonl", "template=classify")
    assert [row["label"] for row in before] == [row["label"] for row in after]
    failed = CliRunner().invoke(
        infer_command,
        ["--model", str(tmp_path / "merged"), "--dataset", rows, "--output", str(tmp_path / "c.jsonl")],
    )
    assert "name the template that its rows need, such as template=classify" in str(failed.exception)


@pytest.mark.slow
def test_two_processes_make_the_same_head_and_count_together(llama: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [{"text": text, "label": name} for text, name in TEXTS])
    found = []
    for processes, size in ((1, 8), (2, 4)):
        summary = run(
            llama, rows, tmp_path / f"run{processes}", "classify", model_options={"labels": ["good", "bad"]},
            options={"batch_size": size, "epochs": 2}, backend={"name": "torch", "device": "cpu", "processes": processes},
        )  # fmt: skip
        found.append(summary)
    assert found[0]["eval_loss"] == pytest.approx(found[1]["eval_loss"], abs=1e-4)
    assert found[0]["eval_metrics"] == pytest.approx(found[1]["eval_metrics"], abs=1e-6)
