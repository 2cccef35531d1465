"""Batches: what padding and packing put where, and that neither changes a model's log-probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from swift_core.types import Batch, ModelBundle, Sample
from swift_plugin_transformers.collation import collate, pack
from swift_plugin_transformers.config import PlainTemplateConfig, TransformersConfig
from swift_plugin_transformers.loading import load_model, load_processor
from swift_plugin_transformers.plain import PlainTemplate
from swift_plugin_transformers.testing import make_tokenizer, save_tiny

A = Sample([5, 6, 7], [0.0, 1.0, 0.5], row=3)
B = Sample([8, 9, 10, 11, 12], [1.0, 0.0, 1.0, 0.0, 1.0], row=4)


def test_padding_by_value() -> None:
    batch = collate([A, B], pad_id=2)
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7, 2, 2], [8, 9, 10, 11, 12]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert sorted(batch.inputs) == ["attention_mask", "input_ids"]
    assert batch.labels.tolist() == batch.inputs["input_ids"].tolist()
    # Nothing predicts a row's first token, and padding has no weight.
    assert batch.weights.tolist() == [[0.0, 1.0, 0.5, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0, 1.0]]
    assert (batch.weight, batch.tokens, batch.trained_tokens, batch.rows) == (3.5, 8, 4, [3, 4])


def test_packing_by_value() -> None:
    packed = pack([A, B])
    assert packed.segments == [3, 5]
    batch = collate([packed], pad_id=2)
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 12]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]]
    assert sorted(batch.inputs) == ["cu_seq_lens_q", "input_ids", "position_ids"]  # a mask would join the segments again
    assert batch.inputs["cu_seq_lens_q"].tolist() == [0, 3, 8]
    assert batch.weights.tolist() == [[0.0, 1.0, 0.5, 0.0, 0.0, 1.0, 0.0, 1.0]]
    assert (batch.weight, batch.tokens, batch.trained_tokens) == (3.5, 8, 4)
    with pytest.raises(ValueError, match="a packed sample is a batch of its own"):
        collate([packed, A], pad_id=2)


def token_logprobs(model: Any, batch: Batch) -> torch.Tensor:
    """log p of each token given those before it, [B, T - 1]."""
    with torch.no_grad():
        logits = model(**batch.inputs, use_cache=False).logits
    return torch.log_softmax(logits[:, :-1].double(), -1).gather(-1, batch.labels[:, 1:, None])[..., 0]


@pytest.fixture(params=["sdpa", "eager"])
def bundle(request: pytest.FixtureRequest, tiny_folder: Path) -> ModelBundle:
    config = TransformersConfig(attention=request.param)
    loaded = load_model(str(tiny_folder), load_processor(str(tiny_folder), config), {}, config)
    assert loaded.model.config._attn_implementation == request.param
    return loaded


def samples(lengths: list[int]) -> list[Sample]:
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randint(3, 259, (length,), generator=generator).tolist() for length in lengths]
    return [Sample(row, [1.0] * len(row), row=n) for n, row in enumerate(rows)]


def test_packed_and_padded_logprobs_are_those_of_each_row_alone(bundle: ModelBundle) -> None:
    rows = samples([9, 23, 1, 17, 2])
    alone = [token_logprobs(bundle.model, collate([row], 0))[0] for row in rows]
    packed = token_logprobs(bundle.model, collate([pack(rows)], 0))[0]
    padded = token_logprobs(bundle.model, collate(rows, 0))
    start = 0
    for n, row in enumerate(rows):
        length = len(row.input_ids)
        assert torch.allclose(packed[start : start + length - 1], alone[n], atol=1e-5, rtol=0)
        assert torch.allclose(padded[n, : length - 1], alone[n], atol=1e-5, rtol=0)
        start += length
    # The check bites: without its own positions the second segment sees the first.
    joined = pack(rows)
    joined.segments = [len(joined.input_ids)]
    leaked = token_logprobs(bundle.model, collate([joined], 0))[0]
    assert float((leaked[9:31] - alone[1]).abs().max()) > 1e-3


def test_padding_never_reaches_the_loss(bundle: ModelBundle) -> None:
    """The weighted loss does not change with what stands in the padding, nor with how much of it there is."""
    short, long = samples([6, 40])

    def loss(batch: Batch) -> float:
        return float(-(token_logprobs(bundle.model, batch)[0] * batch.weights[0, 1:]).sum())

    alone = loss(collate([short], 0))
    assert loss(collate([short, long], 0)) == pytest.approx(alone, abs=1e-5)
    assert loss(collate([short, long], 77)) == pytest.approx(alone, abs=1e-5)


def test_mistral_segments_are_isolated_under_a_sliding_window(tmp_path: Path) -> None:
    """Another attention mask path of transformers: a sliding window."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=259, sliding_window=8, max_position_embeddings=256,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    rows = samples([12, 30, 5])
    packed = token_logprobs(model, collate([pack(rows)], 0))[0]
    alone = token_logprobs(model, collate([rows[1]], 0))[0]
    assert torch.allclose(packed[12:41], alone, atol=1e-5, rtol=0)


def test_plain_template_trains_every_token_and_the_end() -> None:
    tokenizer = make_tokenizer()
    row = {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "é"}]}
    (sample,) = PlainTemplate(tokenizer, PlainTemplateConfig()).encode(row)
    ids = tokenizer("abé")["input_ids"]
    assert len(ids) == 4  # é is two bytes
    assert sample.input_ids == [*ids, tokenizer.eos_token_id]
    assert sample.weights == [1.0] * 5
    assert (sample.text, sample.spans, sample.turns) == ("abé", [(0, 3)], [0, 1])
    (open_end,) = PlainTemplate(tokenizer, PlainTemplateConfig(end=False)).encode(row)
    assert open_end.input_ids == ids
    assert PlainTemplate(tokenizer, PlainTemplateConfig()).prompt(row["messages"][:1]) == ids[:2]
    with pytest.raises(ValueError, match="the row has no text"):
        PlainTemplate(tokenizer, PlainTemplateConfig()).encode({"messages": [{"role": "assistant", "content": ""}]})


def test_tiny_model_is_always_the_same(tiny_folder: Path, tmp_path: Path) -> None:
    """The fixture's weights do not depend on the state of the random generators, and leave it alone."""
    torch.manual_seed(123)
    before = torch.get_rng_state()
    save_tiny(tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), before)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tiny_folder / "model.safetensors").read_bytes()
