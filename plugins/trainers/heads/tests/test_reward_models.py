"""Reward models: a step's loss and gradient against TRL's trainer, and process rewards against the transformers library."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from swift_core.config import build_options, parse_config
from swift_core.errors import RequestError
from swift_core.plan import Plan
from swift_core.session import Session
from swift_core.source import SampleList
from swift_core.testing import PartContract, TrainerContract
from swift_core.training import train
from swift_core.types import Data, Run
from swift_plugin_heads import metrics
from swift_plugin_heads.config import RewardConfig
from swift_plugin_heads.forms import StepRows
from swift_plugin_heads.trainer import HeadTrainer, judges_apart
from swift_plugin_transformers.pooling import last_tokens
from swift_plugin_transformers.testing import make_tokenizer, save_tiny

TOLERANCE = 1e-5


class TestStepRows(PartContract):
    distribution, id = "swift-plugin-heads", "rows/steps"


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a head of one score."""
    folder = save_tiny(tmp_path_factory.mktemp("reward") / "model")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = transformers.LlamaForSequenceClassification.from_pretrained(folder, num_labels=1)
        torch.nn.init.normal_(model.score.weight, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a head of two classes a token."""
    folder = save_tiny(tmp_path_factory.mktemp("prm") / "model")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = transformers.AutoConfig.from_pretrained(folder, num_labels=2)
        config.classifier_dropout = 0.0
        model = transformers.LlamaForTokenClassification.from_pretrained(folder, config=config)
    model.save_pretrained(folder)
    return folder


def said(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


PAIRS = [
    {"messages": said("how was it", "warm and fine"), "rejected": said("how was it", "grim"), "margin": 0.5},
    {"messages": said("where is it", "here"), "rejected": said("where is it", "I will not tell you"), "margin": 0.0},
]
STEPS = [
    {"prompt": "2 + 2 + 3", "completions": ["2 + 2 = 4", "4 + 3 = 8"], "labels": [True, False]},
    {"prompt": "1 + 1", "completions": ["it is 2"], "labels": [True]},
]


def graded(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(folder: Path, output: Path, trainer: str, rows: list[dict[str, Any]], flat: bool | None = None, **options: Any) -> Any:
    """Loss, gradients and samples of one step over the rows. flat: end to end, with shared beginnings or without."""
    template_id = "tag" if trainer == "prm" else trainer
    tree = {
        "model": {"name": str(folder), "task": "token_classification" if trainer == "prm" else "reward"}, "tuner": "full",
        "trainer": {"name": trainer, **options}, "template": template_id,
        "backend": {"name": "torch", "device": "cpu", "precision": "fp32"},
    }  # fmt: skip
    with Session(parse_config(tree)) as session:
        template = session.template(session.model_ref, session.processor(session.model_ref))
        encode = (lambda row: StepRows().encode(template, row)) if trainer == "prm" else template.encode
        samples = [sample for row in rows for sample in encode(row)]
        given = (session.config, session.trainer.options, Plan(), session.processor(session.model_ref), template)
        run = Run(
            *given, Data(SampleList(samples), SampleList(), {}), session.backend, session.events, session, output,
            resume_from=None, warm_start=None, part=session.part, engine=session.policy_engine,
        )  # fmt: skip
        made, tuned = HeadTrainer(trainer, run), session.get("policy")
        steps = session.backend.prepare({"policy": tuned}, None, session.trainer.options)
        if flat is not None:
            assert judges_apart(steps, template, SampleList(samples), share=flat)
            packed = template.pack(samples, share=flat)
            assert bool(packed.shared) == flat
        given = samples if flat is None else [packed]
        loss = steps.forward_backward([template.collate(given)], made.loss_fn).loss
        return loss, {name: p.grad.clone() for name, p in tuned.trainable().items() if p.grad is not None}, samples


def check(mine: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == other.keys()
    assert max(float((mine[name] - other[name]).abs().max()) for name in other) < TOLERANCE
    assert max(float(grad.abs().max()) for grad in other.values()) > 1e-3


@pytest.mark.parametrize("flat", [None, False, True], ids=["padded", "flat", "shared"])
@pytest.mark.parametrize("center", [None, 0.0, 0.05])
def test_reward_is_trls(center: float | None, flat: bool | None, scorer: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    loss, grads, samples = step(scorer, tmp_path, "reward", PAIRS, flat, center=center)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(scorer, dtype=torch.float32)
    texts = []
    for place in (0, 1):
        for sample in samples:
            at = sample.label["lengths"][0]
            texts.append(sample.input_ids[at:] if place else sample.input_ids[:at])
    width = max(map(len, texts))
    ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), "margin": torch.tensor([0.5, 0.0])}
    same = SimpleNamespace(gather_for_metrics=lambda x: x, gather=lambda x: x)
    trainer = SimpleNamespace(
        model=model, args=SimpleNamespace(center_rewards_coefficient=center), accelerator=same, _metrics=defaultdict(
            lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    margin = inputs.pop("margin")

    class Ignoring:
        """The model without the argument that is for the loss alone."""

        def __call__(self, margin: Any, **rest: Any) -> Any:
            return model(**rest)

    wanted = trl.RewardTrainer.compute_loss(trainer, Ignoring(), {**inputs, "margin": margin})
    assert loss == pytest.approx(float(wanted.detach()), abs=TOLERANCE)
    check(grads, graded(model, wanted))


def test_texts_end_to_end_are_judged_where_padded_ones_are() -> None:
    """At the last token that does not pad, as a text may end with the token that pads; shared beginnings are not judged."""
    ids = torch.tensor([5, 6, 7, 8, 0, 9, 0, 0, 4, 4, 4, 0])
    ends, seen = torch.tensor([0, 3, 5, 8, 10, 12]), torch.tensor([0, 3, 8, 14, 16, 18])
    assert last_tokens(ids, ends, seen, pad=0).tolist() == [3, 5, 9, 10]
    assert last_tokens(ids, ends, ends, pad=None).tolist() == [2, 4, 7, 9, 11]


@pytest.mark.parametrize(("kind", "flat"), [("llama", True), ("bert", False), ("jamba", False)])
def test_texts_are_laid_end_to_end_where_the_model_keeps_them_apart(kind: str, flat: bool, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    if kind == "bert":
        tokenizer.add_special_tokens({"cls_token": "<|im_start|>", "sep_token": "<|im_end|>"})
    more = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    if kind == "jamba":  # attention and state-space layers
        more |= {"num_key_value_heads": 2, "num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
                 "use_mamba_kernels": False}  # fmt: skip
    config = transformers.AutoConfig.for_model(kind, vocab_size=len(tokenizer), pad_token_id=0, num_labels=2, **more)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    tree = {
        "model": {"name": str(tmp_path / "model"), "labels": ["a", "b"]}, "tuner": "full", "trainer": "classify",
        "template": "classify", "backend": {"name": "torch", "device": "cpu", "precision": "fp32"},
    }  # fmt: skip
    with Session(parse_config(tree)) as session:
        template = session.template(session.model_ref, session.processor(session.model_ref))
        texts = ["the fine day was long", "so it was", "a grim one"]
        samples = [template.encode({"messages": [{"role": "user", "content": text}], "label": "a"})[0] for text in texts]
        steps = session.backend.prepare({"policy": session.get("policy")}, None, session.trainer.options)
        assert judges_apart(steps, template, SampleList(samples), share=False) == flat


def test_a_pair_of_two_alike_is_refused(scorer: Path) -> None:
    with Session(parse_config({"model": {"name": str(scorer), "task": "reward"}, "template": "reward"})) as session:
        template = session.template(session.model_ref, session.processor(session.model_ref))
        with pytest.raises(ValueError, match="the two conversations are the same: neither is better"):
            template.encode({"messages": said("how was it", "fine"), "rejected": said("how was it", "fine")})


def test_center_is_refused_below_0() -> None:
    with pytest.raises(RequestError, match="center must be at least 0 or null, not -1"):
        build_options(RewardConfig, {"center": -1}, "trainer.reward")


# --- process rewards --------------------------------------------------------------------------------------------------


def test_steps_are_judged_where_they_end(judge: Path, tmp_path: Path) -> None:
    """Tokens and labels are made here as TRL's trainer of process rewards made them; loss and gradient are the library's."""
    loss, grads, samples = step(judge, tmp_path, "prm", rows := [
        {**row, "messages": [{"role": "user", "content": row["prompt"]}]} for row in STEPS
    ])  # fmt: skip
    tokenizer, made = transformers.AutoTokenizer.from_pretrained(judge), []
    separator = tokenizer("\n", add_special_tokens=False)["input_ids"]
    for row in rows:
        ids, labels = tokenizer(row["prompt"])["input_ids"], []
        labels = [-100] * len(ids)
        for text, label in zip(row["completions"], row["labels"], strict=True):
            own = tokenizer(text, add_special_tokens=False)["input_ids"] + separator
            ids, labels = ids + own, labels + [-100] * (len(own) - 1) + [int(label)]
        made.append((ids, labels))
    assert [(sample.input_ids, sample.label["value"]) for sample in samples] == made
    width = max(len(ids) for ids, _ in made)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in made])
    labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in made])
    model = transformers.AutoModelForTokenClassification.from_pretrained(judge, dtype=torch.float32)
    wanted = model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss
    assert loss == pytest.approx(float(wanted.detach()), abs=TOLERANCE)
    check(grads, graded(model, wanted))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"labels": [True]}, "the row has no list 'completions'"),
        ({"completions": ["a", "b"], "labels": [True]}, "the row has 2 steps in 'completions' and 1 'labels'"),
        ({"completions": ["a"]}, "1 steps in 'completions' and no list of 'labels'"),
        ({"completions": ["a"], "labels": ["right"]}, "label 'right' is no known class"),
        ({"completions": ["a"], "labels": [True], "step_separator": ""}, "step_separator must be a text"),
    ],
)
def test_a_row_of_steps_that_cannot_be_is_refused(row: dict[str, Any], reason: str, judge: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "q", **row}), encoding="utf-8")
    with pytest.raises(RequestError, match=reason) as caught:
        fit(judge, str(file), tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_a_row_of_which_no_step_is_left_says_so(judge: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "q", "completions": ["a long first step"], "labels": [True]}), encoding="utf-8")
    with pytest.raises(RequestError, match=r"longer than template\.max_length, 4: no step is left to judge"):
        fit(judge, str(file), tmp_path / "run", template={"max_length": 4})


def fit(model: Path, rows: str, output: Path, template: Any = None, **options: Any) -> dict[str, Any]:
    return train(parse_config({
        "model": str(model), "dataset": rows, "eval_dataset": rows, "output": str(output), "tuner": "full",
        **({"template": template} if template else {}),
        "trainer": {"name": "prm", "epochs": 12, "batch_size": 8, "learning_rate": 3e-3, **options},
        "backend": {"name": "torch", "device": "cpu"},
    }))  # fmt: skip


def test_wrong_steps_are_told_from_right_ones(judge: Path, tmp_path: Path) -> None:
    sums = [(a, b) for a in range(1, 5) for b in range(1, 5)]
    rows = [
        {"prompt": f"{a} + {b}", "completions": ["fine", "grim" if (a + b) % 2 else "warm"], "labels": [True, not (a + b) % 2]}
        for a, b in sums
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = fit(judge, str(file), tmp_path / "run")["eval_metrics"]
    assert found == {"accuracy": 1.0, "row_accuracy": 1.0}
    folder = tmp_path / "run" / "checkpoints" / "last"
    assert transformers.AutoModelForTokenClassification.from_pretrained(folder).config.num_labels == 2


def test_figures_of_steps() -> None:
    assert metrics.steps([[1, 0], [1]], [[1, 1], [1]]) == {"accuracy": pytest.approx(2 / 3), "row_accuracy": 0.5}


class TestPrm(TrainerContract):
    distribution, id = "swift-plugin-heads", "prm"

    @pytest.fixture
    def run(self, config: Any, judge: Path, tmp_path: Path) -> Any:
        tree = {"model": {"name": str(judge), "task": "token_classification"}, "template": "tag", **self.settings}
        with Session(parse_config(tree)) as session:
            template = session.template(session.model_ref, session.processor(session.model_ref))
            rows = [{**row, "messages": [{"role": "user", "content": row["prompt"]}]} for row in STEPS]
            samples = SampleList([sample for row in rows for sample in StepRows().encode(template, row)])
            given = (session.config, config, Plan(), session.processor(session.model_ref), template)
            yield Run(
                *given, Data(samples, SampleList(), {}), session.backend, session.events, session, tmp_path,
                resume_from=None, warm_start=None, part=session.part, engine=session.policy_engine,
            )  # fmt: skip
