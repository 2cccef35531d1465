"""Families that take media another way than most: IDEFICS, which wants a picture in each row, and encoders that read a picture
or a sound and nothing else.

Tiny random models of the library's own classes; what a batch gives is held against each row alone, and answers against the
library's own `generate`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from swift_core.types import Request
from swift_plugin_full.config import FullConfig
from swift_plugin_full.tuner import FullTuned
from swift_plugin_supervised.loop import cross_entropy
from swift_plugin_torch.config import TransformersEngineConfig
from swift_plugin_torch.engine import TransformersEngine

QUESTION, ANSWER = "What is it?", "A wave."


def made(model_type: str, folder: Path) -> Any:
    """A saved tiny model, as `models verify` makes it."""
    from swift_plugin_verify.build import build
    from swift_plugin_verify.catalog import architectures
    from swift_plugin_verify.checks import Subject

    (one,) = [one for one in architectures() if one.model_type == model_type and one.kind != "text"]
    build(one, folder / "model")
    return Subject(folder / "model", folder, None, one.kind, model_type)


def row(medium: bytes | None, answer: str = ANSWER, question: str = QUESTION, kind: str = "image") -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": question}]
    talk = [{"role": "user", "content": [{"type": kind}, *parts] if medium else question}]
    return {"messages": [*talk, {"role": "assistant", "content": answer}], **({f"{kind}s": [medium]} if medium else {})}


def test_idefics_takes_rows_with_and_without_pictures_in_one_pass(tmp_path: Path) -> None:
    """Log-probabilities and gradients of the mixed pass are those of each row alone; a row without a picture sees none."""
    from swift_plugin_verify.rows import png

    subject = made("idefics", tmp_path)
    bundle = subject.bundle()
    template = bundle.template
    samples = [
        sample
        for each in (row(png(1)), row(None), row(png(2), "Two."), row(None, "None at all."))
        for sample in template.encode(each)
    ]
    steps = subject.steps(FullTuned(bundle, FullConfig()))
    alone = torch.cat([steps.forward("policy", template.collate([sample])).logprobs() for sample in samples])
    batch = template.collate(samples)
    assert batch.inputs["pixel_values"].shape[:2] == (4, 1)
    assert not batch.inputs["pixel_values"][[1, 3]].any()
    assert not batch.inputs["image_attention_mask"][[1, 3]].any()
    torch.testing.assert_close(steps.forward("policy", batch).logprobs(), alone, atol=1e-5, rtol=0)
    text_only = template.collate([samples[1], samples[3]])
    assert text_only.inputs["image_attention_mask"].shape == (*text_only.labels.shape, 1)
    mixed = steps.forward_backward([batch], cross_entropy).loss
    assert mixed == pytest.approx(float(-alone.sum()) / len(alone), abs=1e-5)
    text_only.inputs["pixel_values"] = text_only.inputs["pixel_values"] + 1.0  # another picture, which no token sees
    again = steps.forward("policy", text_only).logprobs()
    counts = [sum(weight != 0 for weight in sample.weights) for sample in samples]
    parts = alone.split(counts)
    torch.testing.assert_close(again, torch.cat([parts[1], parts[3]]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("model_type", "kind"), [("vision-encoder-decoder", "image"), ("pix2struct", "image"), ("whisper", "audio")]
)
def test_an_encoder_of_media_alone_leaves_the_prompt_to_the_decoder(model_type: str, kind: str, tmp_path: Path) -> None:
    """As Donut, Pix2Struct and Whisper have it: what the user says is what the decoder begins with, untrained."""
    from swift_plugin_verify.rows import png, wav
    from transformers import GenerationMixin

    subject = made(model_type, tmp_path)
    bundle = subject.bundle()
    template = bundle.template
    make, key = (png if kind == "image" else wav), f"{kind}s"
    rows = [row(make(1), kind=kind), row(make(2), "Two.", "Is that what I think that it is?", kind)]
    (sample,) = template.encode(rows[0])
    start, tokenizer = template.tokenizer.decoder_start, template.tokenizer
    prompt = [
        start,
        *tokenizer(template.prompt_text([{"role": "user", "content": QUESTION}]), add_special_tokens=False).input_ids,
    ]
    assert sample.input_ids[: len(prompt)] == prompt
    assert sample.weights == [0.0] * len(prompt) + [1.0] * (len(ANSWER) + 1)
    with pytest.raises(ValueError, match=f"reads one {kind} and no text, and the prompt has 0 of them"):
        template.encode(row(None))
    expected = []
    for each in rows:
        inputs = template.inputs(each["messages"][:1], {key: each[key]})
        ids = GenerationMixin.generate(bundle.model, **inputs, max_new_tokens=8, do_sample=False)
        expected.append(ids[0, inputs["decoder_input_ids"].shape[1] :].tolist())
    engine = TransformersEngine(bundle, TransformersEngineConfig())
    requests = [Request(messages=each["messages"][:1], media={key: each[key]}, max_tokens=8) for each in rows]
    done = sorted(engine.generate([requests[0], requests[0], requests[1]]), key=lambda completion: completion.index)
    assert [completion.token_ids for completion in done] == [expected[0], expected[0], expected[1]]
    assert done[0].prompt_tokens == len(prompt)
    both = [found for each in rows for found in template.encode(each)]
    steps = subject.steps(FullTuned(bundle, FullConfig()))
    alone = torch.cat([steps.forward("policy", template.collate([one])).logprobs() for one in both])
    torch.testing.assert_close(steps.forward("policy", template.collate(both)).logprobs(), alone, atol=1e-5, rtol=0)
    engine.close()
