"""Five tiny multimodal models with their real processor classes: ids, masks, losses and batches against direct computation.

What is expected comes from the transformers library alone: its processors' `apply_chat_template` and its models' forward.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from swift_core.types import Row, Sample
from swift_plugin_supervised.isolation import isolates
from swift_plugin_transformers.attention import install
from swift_plugin_transformers.chat import ChatTemplate
from swift_plugin_transformers.config import ChatTemplateConfig

sys.path.insert(0, str(Path(__file__).parent))
from media_models import MODELS, Tiny, paligemma, picture, sound

ALL = pytest.mark.parametrize("name", MODELS)


@cache
def opened(name: str) -> tuple[Tiny, ChatTemplate]:
    tiny = MODELS[name]()
    return tiny, ChatTemplate(tiny.processor, ChatTemplateConfig())


def rows(kind: str) -> list[Row]:
    """Two media in two turns; one; none; a question that begins with line ends right after its medium."""
    make = picture if kind == "image" else sound
    column, part = f"{kind}s", {"type": kind}
    media = [make(1), make(2), make(3), make(4)]
    if kind == "image":
        media = [picture(1, (40, 24)), picture(2, (24, 60)), picture(3, (16, 16)), picture(4, (64, 20))]
    else:
        media = [sound(1, 0.4), sound(2, 0.9), sound(3, 0.2), sound(4, 0.6)]
    return [
        {"messages": [
            {"role": "user", "content": [part, {"type": "text", "text": "What is this?"}]},
            {"role": "assistant", "content": "A cat, on a mat."},
            {"role": "user", "content": [{"type": "text", "text": "And this one: "}, part]},
            {"role": "assistant", "content": "No cat."},
        ], column: media[:2]},
        {"messages": [
            {"role": "user", "content": [{"type": "text", "text": "Look. "}, part, {"type": "text", "text": " Well?"}]},
            {"role": "assistant", "content": "Nothing there.\n\nReally."},
        ], column: media[2:3]},
        {"messages": [{"role": "user", "content": "No picture here."}, {"role": "assistant", "content": "I see."}]},
        {"messages": [
            {"role": "user", "content": [part, {"type": "text", "text": "\n\nWell?"}]},
            {"role": "assistant", "content": "Yes."},
        ], column: media[3:]},
    ]  # fmt: skip


def talk(row: Row, kind: str) -> list[Row]:
    """The row as the library takes it: references in the parts, every content a list of parts."""
    waiting = iter(row.get(f"{kind}s", []))
    messages = []
    for message in row["messages"]:
        parts = message["content"]
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        filled = []
        for part in parts:
            if part["type"] == kind:
                medium = next(waiting)
                filled.append({"type": kind, kind: medium if kind == "image" else medium["array"]})
            else:
                filled.append(part)
        messages.append({**message, "content": filled})
    return messages


def official(tiny: Tiny, messages: list[Row], prompt: bool = False) -> dict[str, Any]:
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": prompt}
    return dict(tiny.processor.apply_chat_template(messages, **options))


def encoded(name: str) -> list[Sample]:
    tiny, template = opened(name)
    return [sample for row in rows(tiny.kind) for sample in template.encode(row)]


@ALL
def test_the_ids_are_those_of_the_processors_own_chat_template(name: str) -> None:
    tiny, template = opened(name)
    for row in rows(tiny.kind):
        (sample,) = template.encode(row)
        assert sample.input_ids == official(tiny, talk(row, tiny.kind))["input_ids"][0].tolist()


@ALL
@pytest.mark.parametrize("tells", [True, False])
def test_exactly_the_answers_are_trained(name: str, tells: bool) -> None:
    """From the length of each generation prompt to the end marker, counted in the library's own ids of each prefix."""
    tiny = opened(name)[0]
    template = ChatTemplate(tiny.processor, ChatTemplateConfig())
    assert template.media is not None
    template.media.tells = tells
    words = tiny.processor.tokenizer
    ends = {words.convert_tokens_to_ids(word) for word in ("<|im_end|>", "</s>")}
    for row in rows(tiny.kind):
        messages = talk(row, tiny.kind)
        expected = [0.0] * len(official(tiny, messages)["input_ids"][0])
        for n, message in enumerate(messages):
            if message["role"] == "assistant":
                start = official(tiny, messages[:n], prompt=True)["input_ids"].shape[1]
                ids = official(tiny, messages[: n + 1])["input_ids"][0].tolist()
                stop = max(place for place, token in enumerate(ids) if token in ends) + 1
                expected[start:stop] = [1.0] * (stop - start)
        (sample,) = template.encode(row)
        assert sample.weights == expected
        assert template.media.tells is tells
        assert "".join(sample.text[start:end] for start, end in sample.spans) == words.decode(
            [token for token, weight in zip(sample.input_ids, sample.weights, strict=True) if weight]
        )


def loss(logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    each = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return (each * weights[:, 1:]).sum() / weights[:, 1:].sum()


@ALL
def test_the_loss_of_a_mixed_batch_is_that_of_its_rows_computed_directly(name: str) -> None:
    tiny, template = opened(name)
    samples, total, count = encoded(name), 0.0, 0.0
    batch = template.collate(samples)
    with torch.no_grad():
        logits = tiny.model(**batch.inputs).logits
        for row, sample in zip(rows(tiny.kind), samples, strict=True):
            inputs = official(tiny, talk(row, tiny.kind))
            weights = torch.tensor(sample.weights)[None]
            direct = tiny.model(**inputs).logits
            total += float(loss(direct, inputs["input_ids"], weights) * weights[:, 1:].sum())
            count += float(weights[:, 1:].sum())
            place = samples.index(sample)
            assert torch.allclose(logits[place, : len(sample.input_ids)], direct[0], atol=1e-5)
    assert float(loss(logits, batch.labels, batch.weights)) == pytest.approx(total / count, abs=1e-5)
    assert batch.weight == count


@ALL
def test_a_batch_without_media_beside_one_with(name: str) -> None:
    tiny, template = opened(name)
    samples = encoded(name)
    bare = template.collate([samples[2], samples[2]])
    assert not {"pixel_values", "input_features"} & set(bare.inputs)
    with torch.no_grad():
        alone = tiny.model(**bare.inputs).logits[1]
        mixed = tiny.model(**template.collate(samples).inputs).logits[2, : len(samples[2].input_ids)]
    assert torch.allclose(alone, mixed, atol=1e-5)


@ALL
def test_another_medium_gives_other_logits(name: str) -> None:
    tiny, template = opened(name)
    row = rows(tiny.kind)[1]
    other = {**row, f"{tiny.kind}s": [picture(9, (16, 16)) if tiny.kind == "image" else sound(9, 0.2)]}
    first, second = (template.collate(template.encode(one)) for one in (row, other))
    assert torch.equal(first.labels, second.labels)
    with torch.no_grad():
        difference = (tiny.model(**first.inputs).logits - tiny.model(**second.inputs).logits)[first.weights > 0].abs().max()
    assert difference > 1e-4


class Bare:
    """As much of a backend's steps as the probe of isolation needs."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def forward(self, role: str, batch: Any) -> Any:
        with torch.no_grad():
            return self.model(**batch.inputs)


@ALL
def test_packs_are_the_rows_where_the_model_allows(name: str) -> None:
    tiny, template = opened(name)
    samples = encoded(name)
    model = MODELS[name]().model
    install(model)
    lack = isolates(Bare(model), template, samples)
    if tiny.padded:
        assert tiny.padded in (lack or "")
        return
    assert lack is None
    packed = template.collate([template.pack(samples)])
    assert "attention_mask" not in packed.inputs
    at = 0
    with torch.no_grad():
        logits = model(**packed.inputs).logits[0]
        for sample in samples:
            alone = tiny.model(**template.collate([sample]).inputs).logits[0]
            assert torch.allclose(logits[at : at + len(sample.input_ids)], alone, atol=1e-5)
            at += len(sample.input_ids)


@ALL
def test_the_inputs_of_inference_are_the_library_s(name: str) -> None:
    tiny, template = opened(name)
    for row in rows(tiny.kind):
        column = f"{tiny.kind}s"
        media = {column: row[column][:1]} if column in row else {}
        found = template.inputs(row["messages"][:1], media)
        expected = official(tiny, talk({"messages": row["messages"][:1], **media}, tiny.kind), prompt=True)
        assert set(found) == set(expected)
        for key, value in expected.items():
            assert torch.equal(found[key], value), key


def test_a_prompt_that_sees_itself_ends_where_the_answer_begins() -> None:
    """PaliGemma: its processor moves and adds tokens, and token_type_ids tell which tokens see each other both ways."""
    tiny = paligemma()
    template = ChatTemplate(tiny.processor, ChatTemplateConfig())
    row = rows("image")[1]
    (sample,) = template.encode(row)
    words = tiny.processor.tokenizer
    trained = [token for token, weight in zip(sample.input_ids, sample.weights, strict=True) if weight]
    assert words.decode(trained) == "Nothing there.\n\nReally.<|im_end|>"
    assert sample.input_ids == official(tiny, talk(row, "image"))["input_ids"][0].tolist()
    batch = template.collate([sample])
    first = next(n for n, weight in enumerate(sample.weights) if weight)
    assert batch.inputs["token_type_ids"][0].tolist() == [0] * first + [1] * (len(sample.input_ids) - first)
    assert "labels" not in batch.inputs
    with torch.no_grad():
        before = tiny.model(**batch.inputs).logits[0]
        batch.inputs["input_ids"][0, -3:] = words.convert_tokens_to_ids("x")
        after = tiny.model(**batch.inputs).logits[0]
    assert torch.allclose(before[:-3], after[:-3], atol=1e-6), "no token of the answer sees a later one"


def test_a_text_with_a_placeholder_of_its_own_is_refused() -> None:
    template = opened("llava")[1]
    row = {"messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A default."}]}
    message = r"the text of messages\[0\] has <image>, which this checkpoint takes for the place of an image"
    with pytest.raises(ValueError, match=message):
        template.encode(row)
    with pytest.raises(ValueError, match=message):
        template.inputs(row["messages"][:1])
    tiny = MODELS["llava"]()
    tiny.processor.image_setting = "ĊĊ"  # a plain token of the vocabulary, as "default" is: no placeholder
    media = ChatTemplate(tiny.processor, ChatTemplateConfig()).media
    assert media is not None
    assert not media.placeholders.search("A ĊĊ.")
