"""What rows become: the two sides of a pair, labelled answers, and each reason to refuse one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from swift_core.parts import parts
from swift_core.testing import PartContract
from swift_core.types import Sample
from swift_plugin_huggingface.rows import standard_row
from swift_plugin_preference.forms import LabelledRows, PairRows
from swift_plugin_preference.testing import pair
from swift_plugin_transformers.chat import ChatTemplate
from swift_plugin_transformers.config import ChatTemplateConfig
from swift_plugin_transformers.testing import make_tokenizer


class TestPairs(PartContract):
    distribution, id = "swift-plugin-preference", "rows/pairs"


class TestLabelled(PartContract):
    distribution, id = "swift-plugin-preference", "rows/labelled"


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate(make_tokenizer(), ChatTemplateConfig())


def trained(template: ChatTemplate, sample: Sample) -> str:
    ids = [token for token, weight in zip(sample.input_ids, sample.weights, strict=True) if weight]
    return str(template.tokenizer.decode(ids))


def said(*texts: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


SHAPES = [
    {"messages": said("Hi", "Yes"), "rejected": said("Hi", "No")},
    {"messages": said("Hi", "Yes"), "rejected_response": "No"},
    {"messages": said("Hi", "Yes"), "rejected_messages": said("Hi", "No")},
    {"prompt": "Hi", "chosen": "Yes", "rejected": "No"},
    {"prompt": "Hi", "chosen": said("Hi", "Yes"), "rejected": said("Hi", "No")},
    {"prompt": said("Hi"), "chosen": said("", "Yes")[1:], "rejected": said("", "No")[1:]},
    {"chosen": said("Hi", "Yes"), "rejected": said("Hi", "No")},
    {"query": "Hi", "response": "Yes", "rejected_response": "No"},
    {"instruction": "Hi", "input": "", "chosen": "Yes", "rejected": "No"},
    {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Yes"},
     "rejected": {"from": "gpt", "value": "No"}},
]  # fmt: skip


@pytest.mark.parametrize("row", SHAPES)
def test_a_pair_in_any_shape(row: dict[str, Any], template: ChatTemplate) -> None:
    (sample,) = PairRows().encode(template, standard_row(row))
    chosen, rejected = parts(sample)
    assert [trained(template, side) for side in (chosen, rejected)] == ["Yes<|im_end|>", "No<|im_end|>"]
    prompt = template.prompt(said("Hi"))
    assert chosen.input_ids[: len(prompt)] == rejected.input_ids[: len(prompt)] == prompt


def test_only_what_differs_is_trained(template: ChatTemplate) -> None:
    """Answers to earlier questions belong to the prompt, unless the row says otherwise."""
    row = {"messages": said("Hi", "Hello", "And?", "Yes"), "rejected": said("Hi", "Hello", "And?", "No")}
    found = parts(PairRows().encode(template, row)[0])
    assert [trained(template, side) for side in found] == ["Yes<|im_end|>", "No<|im_end|>"]
    for key in ("messages", "rejected"):
        row[key][1] = {**row[key][1], "train": True}
    found = parts(PairRows().encode(template, row)[0])
    assert trained(template, found[0]) == "Hello<|im_end|>Yes<|im_end|>"
    several = {"messages": said("Hi", "Yes", "Sure?", "I am"), "rejected": said("Hi", "No", "Sure?", "I am not")}
    found = parts(PairRows().encode(template, several)[0])
    assert trained(template, found[0]) == "Yes<|im_end|>I am<|im_end|>"


def test_a_weight_of_a_message_is_kept(template: ChatTemplate) -> None:
    row = pair("Hi", "Yes", "No")
    row["messages"][-1]["weight"] = 0.5
    chosen, rejected = parts(PairRows().encode(template, row)[0])
    assert ({*chosen.weights}, {*rejected.weights}) == ({0.0, 0.5}, {0.0, 1.0})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": said("Hi", "Yes")}, "no 'rejected' answer"),
        ({"messages": said("Hi", "Yes"), "rejected": said("Hi", "Yes")}, "the chosen and the rejected answer are the same"),
        ({"messages": said("Hi", "Yes"), "rejected": said("Ho", "No")}, "no common prompt: their first messages differ"),
        ({"messages": said("Hi", "Yes", "So?", "A"), "rejected": said("Hi", "Yes", "Why?", "B")},
         "they part at message 2, which in the chosen one is of role user"),
        ({"messages": said("Hi", "Yes"), "rejected": said("Hi")}, "the rejected conversation has no answer of its own"),
        ({"messages": said("Hi", "Yes"), "rejected": [*said("Hi"), {"role": "assistant", "content": "No", "train": False}]},
         "the rejected side's conversation: the row has no trainable token"),
    ],
)  # fmt: skip
def test_a_pair_that_teaches_nothing_is_refused(row: dict[str, Any], reason: str, template: ChatTemplate) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        PairRows().encode(template, row)
    assert "\n" not in str(caught.value)


def test_sides_that_the_template_writes_alike_are_refused(template: ChatTemplate) -> None:
    class Trimming:
        def encode(self, row: dict[str, Any]) -> list[Sample]:
            said = [{**message, "content": message["content"].strip()} for message in row["messages"]]
            return template.encode({"messages": said})

    with pytest.raises(ValueError, match="the same, as the template writes them"):
        PairRows().encode(Trimming(), pair("Hi", "Yes", "Yes "))  # type: ignore[arg-type]


def test_prompts_that_the_template_writes_otherwise_are_refused(template: ChatTemplate) -> None:
    class Told:
        def encode(self, row: dict[str, Any]) -> list[Sample]:
            """Says before the prompt how long the answer is."""
            first = {"role": "system", "content": str(len(row["messages"][-1]["content"]))}
            return template.encode({"messages": [first, *row["messages"]]})

    with pytest.raises(ValueError, match="no common prompt: the template writes differently"):
        PairRows().encode(Told(), pair("Hi", "Yes", "No"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": said("Hi", "Yes")}, {"prompt": "Hi", "completion": "Yes"},
        {"prompt": said("Hi"), "completion": said("", "Yes")[1:]}, {"query": "Hi", "response": "Yes"},
    ],
)  # fmt: skip
def test_a_labelled_answer_in_any_shape(row: dict[str, Any], template: ChatTemplate) -> None:
    (sample,) = LabelledRows().encode(template, standard_row({**row, "label": False}))
    assert sample.label == {"good": False}
    assert trained(template, sample) == "Yes<|im_end|>"


def test_labels(template: ChatTemplate) -> None:
    for label, good in ((True, True), ("false", False), (0, False), ("True", True), (1.0, True)):
        (sample,) = LabelledRows().encode(template, {"messages": said("Hi", "Hello", "And?", "Yes"), "label": label})
        assert sample.label == {"good": good}
        assert trained(template, sample) == "Yes<|im_end|>"
    found = LabelledRows().encode(template, pair("Hi", "Yes", "No"))
    assert [(sample.label, trained(template, sample)) for sample in found] == [
        ({"good": True}, "Yes<|im_end|>"), ({"good": False}, "No<|im_end|>"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": said("Hi", "Yes")}, "neither a 'label', true or false, nor a 'rejected' answer"),
        ({"messages": said("Hi", "Yes"), "label": "good"}, "label 'good': expected true for a good answer"),
        ({"messages": said("Hi", "Yes", "And?"), "label": True}, "the row has no answer to its last question"),
    ],
)
def test_a_label_that_cannot_be_used_is_refused(row: dict[str, Any], reason: str, template: ChatTemplate) -> None:
    with pytest.raises(ValueError, match=reason):
        LabelledRows().encode(template, row)


@pytest.mark.parametrize(("name", "form"), [("dpo", PairRows()), ("kto", LabelledRows())])
def test_published_rows(name: str, form: Any, template: ChatTemplate) -> None:
    """All rows of a published data set, where it is there, are read, or refused for what they are."""
    import json

    file = Path(__file__).parents[4].parent / "shared" / "fixtures" / "datasets" / f"{name}_en_demo.json"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    rows, refused = json.loads(file.read_text(encoding="utf-8")), []
    for row in rows[:60]:
        try:
            assert form.encode(template, standard_row(row))[0].trained_tokens
        except ValueError as err:
            refused.append(str(err))
    assert len(refused) <= 3, refused
