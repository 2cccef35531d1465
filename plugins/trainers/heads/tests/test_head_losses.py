"""Losses and figures against the transformers library's own, against plain formulas, and against scikit-learn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from swift_core.errors import RequestError
from swift_core.testing import TrainerContract
from swift_plugin_heads import losses, metrics
from swift_plugin_torch.head import told
from swift_plugin_transformers.config import TaskTemplateConfig, TransformersConfig
from swift_plugin_transformers.loading import load_model, load_processor
from swift_plugin_transformers.tasks import Classify, Rerank, Tag
from swift_plugin_transformers.testing import make_tokenizer, save_tiny


def save_family(family: str, folder: Path) -> Path:
    """A tiny random language model of a family, as its checkpoints are published."""
    if family == "llama":
        return save_tiny(folder)
    tokenizer = make_tokenizer()
    small: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "vocab_size": len(tokenizer), "pad_token_id": 0,
    }  # fmt: skip
    heads: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8}
    config, cls = {
        "qwen3": lambda: (transformers.Qwen3Config(**small | {"pad_token_id": None}, **heads), transformers.Qwen3ForCausalLM),
        "gemma": lambda: (transformers.GemmaConfig(**small, **heads), transformers.GemmaForCausalLM),
        "bert": lambda: (transformers.BertConfig(**small), transformers.BertForMaskedLM),
    }[family]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        cls(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma", "bert"])
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_family(request.param, tmp_path_factory.mktemp("models") / request.param))


def load(folder: str, **options: Any) -> Any:
    config = TransformersConfig(**options)
    with pytest.warns(UserWarning, match="is new, drawn from the seed"):
        return load_model(folder, load_processor(folder, config), {}, config)


TEXTS = ["a", "some more words than that", "a b c", "the longest of them all, with an end"]
LABELS = {"single_label": [0, 2, 1, 2], "multi_label": [[0, 2], [], [1], [0, 1, 2]], "regression": [[0.5, 1.0, -2.0]] * 4}


@pytest.mark.parametrize("problem", list(LABELS))
def test_classification_loss_is_the_librarys(folder: str, problem: Any) -> None:
    bundle = load(folder, task="sequence_classification", num_labels=3, problem=problem)
    template = Classify(bundle.processor, TaskTemplateConfig(problem=problem))
    rows = [{"messages": [{"role": "user", "content": t}], "label": v} for t, v in zip(TEXTS, LABELS[problem], strict=True)]
    batch = template.collate([sample for row in rows for sample in template.encode(row)])
    values = LABELS[problem]
    labels = losses.many_hot(values, 3) if problem == "multi_label" else torch.tensor(values)
    model = bundle.model.eval()
    theirs = model(**batch.inputs, labels=labels)
    ours = losses.classification(told(model, batch.inputs), batch.targets["value"]) / batch.weight
    assert float(ours) == pytest.approx(float(theirs.loss), abs=1e-5)
    head = [p for n, p in model.named_parameters() if n.startswith(("score", "classifier"))]
    for a, b in zip(torch.autograd.grad(ours, head), torch.autograd.grad(theirs.loss, head), strict=True):
        assert float((a - b).abs().max()) < 1e-5


def test_tagging_loss_is_the_librarys(folder: str) -> None:
    bundle = load(folder, task="token_classification", num_labels=3)
    template = Tag(bundle.processor, TaskTemplateConfig(num_labels=3))
    rows = [{"messages": [{"role": "user", "content": t}], "label": [n % 3 for n in range(len(t.split()))]} for t in TEXTS]
    batch = template.collate([sample for row in rows for sample in template.encode(row)])
    labels = torch.full(batch.inputs["input_ids"].shape, -100)
    for row, value in enumerate(batch.targets["value"]):
        labels[row, : len(value)] = torch.tensor(value)
    assert batch.weight == float((labels != -100).sum()) == sum(len(text.split()) for text in TEXTS)
    model = bundle.model.eval()
    ours = losses.tagging(told(model, batch.inputs), batch.targets["value"]) / batch.weight
    assert float(ours) == pytest.approx(float(model(**batch.inputs, labels=labels).loss), abs=1e-5)


@pytest.mark.parametrize("task", ["sequence_classification", "reward", "reranker"])
def test_a_batch_of_mixed_lengths_equals_single_rows(folder: str, task: Any) -> None:
    """Also where the checkpoint names no padding token, and where a text ends with the token that pads."""
    bundle = load(folder, task=task, num_labels=3 if task == "sequence_classification" else None)
    template = Classify(bundle.processor, TaskTemplateConfig())
    texts = [*TEXTS, "ends with an end<|im_end|>", "ends with padding<|pad|>"]
    samples = [template.sample({"messages": [{"role": "user", "content": text}]}, labelled=False) for text in texts]
    with torch.no_grad():
        whole = told(bundle.model, template.collate(samples).inputs)
        single = torch.cat([told(bundle.model, template.collate([sample]).inputs) for sample in samples])
    assert whole.shape == (6, 3 if task == "sequence_classification" else 1)
    assert float((whole - single).abs().max()) < 1e-5
    assert float((whole[0] - whole[1]).abs().max()) > 1e-4


def test_a_new_head_is_the_same_whatever_ran_before(folder: str) -> None:
    heads = []
    for draws in (0, 7):
        torch.manual_seed(5)
        torch.rand(draws)
        heads.append(dict(load(folder, task="sequence_classification", num_labels=3).model.named_parameters()))
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    torch.manual_seed(6)
    other = dict(load(folder, task="sequence_classification", num_labels=3).model.named_parameters())
    changed = [name for name in other if not torch.equal(other[name], heads[0][name])]
    assert changed
    assert all(name.startswith(("score", "classifier")) or "pooler" in name for name in changed)


def test_infonce_is_its_formula() -> None:
    queries, documents = (torch.nn.functional.normalize(torch.randn(n, 6), dim=1) for n in (3, 5))
    own, allowed = torch.tensor([0, 2, 4]), torch.ones(3, 5, dtype=torch.bool)
    allowed[0, 3] = False
    expected = 0.0
    for row in range(3):
        shares = [math.exp(float(queries[row] @ documents[d]) / 0.1) * bool(allowed[row, d]) for d in range(5)]
        expected -= math.log(shares[int(own[row])] / sum(shares))
    assert float(losses.infonce(queries, documents, own, 0.1, allowed)) == pytest.approx(expected, rel=1e-5)


def test_cosent_is_its_formula() -> None:
    cosines, labels = torch.tensor([0.1, 0.7, -0.3, 0.2]), torch.tensor([1.0, 0.0, 0.5, 0.5])
    pairs = [(i, j) for i in range(4) for j in range(4) if labels[i] > labels[j]]
    expected = 4 * math.log(1 + sum(math.exp(float(cosines[j] - cosines[i]) / 0.5) for i, j in pairs))
    assert len(pairs) == 5
    assert float(losses.cosent(cosines, labels, 0.5)) == pytest.approx(expected, rel=1e-5)


def test_bradley_terry_is_its_formula() -> None:
    scores = torch.tensor([1.0, 0.5, -1.0, 2.0])
    expected = -math.log(1 / (1 + math.exp(-(0.5 - 0.2)))) - math.log(1 / (1 + math.exp(3.0)))
    assert float(losses.bradley_terry(scores, [0.2, 0.0])) == pytest.approx(expected, rel=1e-5)


def test_ranking_is_softmax_over_documents_or_a_label() -> None:
    scores = torch.tensor([1.0, 0.0, -1.0, 0.3])
    expected = -math.log(math.e / (math.e + 1 + 1 / math.e)) - math.log(1 - 1 / (1 + math.exp(-0.3)))
    assert float(losses.ranking(scores, [3, 1], [None, 0.0])) == pytest.approx(expected, rel=1e-5)


def test_labels_without_a_place_are_refused() -> None:
    with pytest.raises(ValueError, match="label 3: the model has 3 classes"):
        losses.classification(torch.zeros(1, 3), [3])
    with pytest.raises(ValueError, match="labels are 2 numbers, and the model gives 3"):
        losses.classification(torch.zeros(1, 3), [[0.5, 1.0]])
    with pytest.raises(ValueError, match="some labels are one class, and some are several or numbers"):
        losses.classification(torch.zeros(2, 3), [1, [0.5]])


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        (Classify, {"label": -1}, "label -1 is below 0"),
        (Classify, {"label": float("nan")}, "label must be a finite number, not nan"),
        (Tag, {"label": [[0, 1, 1], [90, 95, 1]]}, r"label \[90, 95, 1\] lies outside the text, which has 3 characters"),
        (Tag, {"label": [[2, 2, 1]]}, "lies outside the text"),
        (Rerank, {"document": "b", "label": 5}, "label 5: a document's label is from 0, no answer, to 1"),
    ],
)
def test_a_label_that_means_nothing_is_refused(folder: str, kind: Any, more: dict[str, Any], message: str) -> None:
    template = kind(load_processor(folder, TransformersConfig()), TaskTemplateConfig())
    with pytest.raises(ValueError, match=message):
        template.encode({"messages": [{"role": "user", "content": "a b"}], **more})


def test_a_cut_text_with_tags_is_noted_and_all_documents_are_scored(folder: str) -> None:
    processor = load_processor(folder, TransformersConfig())
    row = {"messages": [{"role": "user", "content": "one two three"}], "label": [1, 0, 1]}
    cut, whole = (Tag(processor, TaskTemplateConfig(max_length=n)).encode(row)[0] for n in (4, 400))
    assert (cut.notes, len(cut.input_ids), whole.notes) == (["text cut"], 4, [])
    given = {"messages": row["messages"], "positive": "a", "negatives": ["b", "c"]}
    for more in (given, {"messages": row["messages"], "documents": ["a", "b", "c"]}):
        assert len(Rerank(processor, TaskTemplateConfig()).sample(more, labelled=False).label["lengths"]) == 3


def test_figures_are_those_of_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    predicted, right = [0, 1, 1, 2, 0, 3], [0, 1, 2, 2, 1, 0]
    found = metrics.classes(predicted, right)
    assert found["accuracy"] == pytest.approx(sklearn.accuracy_score(right, predicted))
    assert found["macro_f1"] == pytest.approx(sklearn.f1_score(right, predicted, average="macro"))
    sets = [[0], [0, 2], [], [1]], [[0, 1], [0, 2], [], [2]]
    hot = [losses.many_hot(side, 3).numpy() for side in sets]
    found = metrics.class_sets(*sets)
    assert found["macro_f1"] == pytest.approx(sklearn.f1_score(hot[1], hot[0], average="macro", zero_division=0))
    assert found["accuracy"] == pytest.approx(sklearn.accuracy_score(hot[1], hot[0]))
    tagged = metrics.tags([[0, 1, 2], [2]], [[0, 1, 1], [0]])
    assert tagged["accuracy"] == 0.5
    flat = sklearn.f1_score([0, 1, 1, 0], [0, 1, 2, 2], labels=[1, 2], average="micro")
    assert tagged["token_f1"] == pytest.approx(flat)


def test_figures_of_numbers_ranks_and_pairs() -> None:
    one, other = [1.0, 2.0, 4.0], [1.5, 1.0, 5.0]
    expected = float(torch.corrcoef(torch.tensor([one, other]))[0, 1])
    found = metrics.numbers([[x] for x in one], [[x] for x in other])
    assert found == {"mse": pytest.approx((0.25 + 1 + 1) / 3), "pearson": pytest.approx(expected, rel=1e-5)}
    assert metrics.pearson([1.0, 1.0], [0.0, 1.0]) == 0.0
    assert metrics.ranks([1, 2, 4]) == {"accuracy": pytest.approx(1 / 3), "mrr": pytest.approx((1 + 0.5 + 0.25) / 3)}
    assert metrics.pairs([1.0, 0.0], [0.5, 2.0]) == {"accuracy": 0.5, "margin": pytest.approx(-0.75)}
    assert metrics.figures("pair", []) == {}


def test_packing_is_refused() -> None:
    from swift_core.config import build_options
    from swift_plugin_heads.config import HeadsConfig

    with pytest.raises(RequestError, match=r"trainer.classify: packing is not to be had with a head"):
        build_options(HeadsConfig, {"packing": True}, "trainer.classify")


class HeadContract(TrainerContract):
    """The trainer contract, on the tiny model loaded for the trainer's task, with rows of its form."""

    task: Any = ""

    @pytest.fixture
    def run(self, config: Any, tiny_folder: Path, tmp_path: Path) -> Any:
        from swift_core import types
        from swift_core.config import parse_config
        from swift_core.plan import Plan
        from swift_core.session import Session
        from swift_core.source import SampleList

        model = {"name": str(tiny_folder), "task": self.task, "num_labels": 2}
        with Session(parse_config({"model": model, "template": self.id, **self.settings})) as session:
            template = session.template(session.model_ref, session.processor(session.model_ref))
            samples = SampleList([sample for row in self.rows for sample in template.encode(row)])
            data = types.Data(samples, SampleList(), {})
            given = (session.config, config, Plan(), session.processor(session.model_ref), template, data)
            yield types.Run(
                *given, session.backend, session.events, session, tmp_path, resume_from=None, warm_start=None,
                part=session.part, engine=session.policy_engine,
            )  # fmt: skip


def said(text: str, **columns: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **columns}


class TestClassify(HeadContract):
    distribution, id, task = "swift-plugin-heads", "classify", "sequence_classification"
    rows = [said("one", label=0), said("another", label=1)]  # noqa: RUF012


class TestTag(HeadContract):
    distribution, id, task = "swift-plugin-heads", "tag", "token_classification"
    rows = [said("one two", label=[0, 1]), said("three", label=[1])]  # noqa: RUF012


class TestEmbed(HeadContract):
    distribution, id, task = "swift-plugin-heads", "embed", "embedding"
    rows = [said("one", positive="1"), said("two", positive="2", negatives=["3"])]  # noqa: RUF012


class TestRerank(HeadContract):
    distribution, id, task = "swift-plugin-heads", "rerank", "reranker"
    rows = [said("one", positive="1", negatives=["2"]), said("two", document="2", label=1.0)]  # noqa: RUF012


class TestReward(HeadContract):
    distribution, id, task = "swift-plugin-heads", "reward", "reward"
    rows = [said("one", rejected=[{"role": "user", "content": "two"}])]  # noqa: RUF012
