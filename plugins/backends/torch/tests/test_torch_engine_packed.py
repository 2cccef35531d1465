"""Weights in oneDNN's layout: the same numbers, one copy in memory, and all given back as it was."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from swift_core.types import ModelBundle, Request
from swift_plugin_torch import packed
from swift_plugin_torch.config import TransformersEngineConfig
from swift_plugin_torch.engine import TransformersEngine

SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "vocab_size": 259, "max_position_embeddings": 256, "attention_bias": True,
}  # fmt: skip
PROMPTS = [[10 + 3 * n + 7 * row for n in range(3 + row)] for row in range(6)]


def made(dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SHAPE, "tie_word_embeddings": False, **more})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


def engine(bundle: ModelBundle, model: Any, **options: Any) -> TransformersEngine:
    return TransformersEngine(replace(bundle, model=model), TransformersEngineConfig(**options))


def packed_layers(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, packed.PackedLinear)]


def plain_bytes(model: Any) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


needs_packing = pytest.mark.skipif(not packed.possible(made()), reason="this machine's torch packs no weights")


@needs_packing
@pytest.mark.parametrize(("tied", "dtype"), [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)])
def test_packed_gives_the_plain_models_numbers_and_is_given_back(tiny_bundle: ModelBundle, tied: bool, dtype: Any) -> None:
    model = made(dtype, tie_word_embeddings=tied)
    if not packed.possible(model):
        pytest.skip("this machine packs no weights of this precision")
    plain, names = copy.deepcopy(model), list(model.state_dict())
    size = plain_bytes(plain)
    served = engine(tiny_bundle, model, prefix_mib=0)
    requests = [Request(token_ids=ids, max_tokens=12, ignore_eos=True) for ids in PROMPTS]
    found = {done.index: done for done in served.generate(requests)}
    assert len(packed_layers(model)) == 2 * 7 + 1
    head = model.config.vocab_size * model.config.hidden_size * model.dtype.itemsize
    linear = sum(module.weight.nbytes for module in plain.modules() if isinstance(module, torch.nn.Linear))
    assert plain_bytes(model) == size - linear + tied * head  # the plain weights are gone, but for the embeddings'
    for n, ids in enumerate(PROMPTS):
        with torch.no_grad():
            scores = torch.log_softmax(plain(torch.tensor([ids + found[n].token_ids])).logits[0].float(), -1)
        chosen = scores[len(ids) - 1 : -1]
        own = chosen.gather(-1, torch.tensor(found[n].token_ids)[:, None])[:, 0]
        near = 1e-4 if dtype == torch.float32 else 0.15
        assert float((chosen.amax(-1) - own).max()) < near  # the likeliest token, but for ties
        assert found[n].logprobs == pytest.approx(own.tolist(), abs=near)
    assert all(torch.equal(own, plain.state_dict()[name]) for name, own in model.state_dict().items())  # while it is packed
    served.close()
    assert packed_layers(model) == []
    assert list(model.state_dict()) == names
    assert all(torch.equal(own, plain.state_dict()[name]) for name, own in model.state_dict().items())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert all(parameter.requires_grad and not parameter.is_inference() for parameter in model.parameters())


@needs_packing
def test_packed_false_leaves_the_weights_alone(tiny_bundle: ModelBundle) -> None:
    model = made()
    weight = model.lm_head.weight
    list(engine(tiny_bundle, model, packed=False).generate([Request(token_ids=[5, 6], max_tokens=2)]))
    assert packed_layers(model) == []
    assert model.lm_head.weight is weight


@needs_packing
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_and_new_weights_on_packed_layers(tiny_bundle: ModelBundle, tmp_path: Path, dora: bool) -> None:
    """A DoRA adapter reads the weights of its layers in every pass: those go back to their plain layout by themselves."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=dora, init_lora_weights="gaussian")
    tuned = peft.get_peft_model(made(), config)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    tuned.save_pretrained(tmp_path)
    served = engine(tiny_bundle, made())
    request = Request(token_ids=PROMPTS[4], max_tokens=24, ignore_eos=True)
    (base,) = served.generate([request])
    served.load_adapter("tuned", tmp_path)
    (found,) = served.generate([replace(request, adapter="tuned")])
    expected = tuned.generate(torch.tensor([PROMPTS[4]]), max_new_tokens=24, do_sample=False, eos_token_id=2**31 - 1)
    assert found.token_ids == expected[0, len(PROMPTS[4]) :].tolist() != base.token_ids
    layers = packed_layers(served.model)
    assert any("q_proj" in name for name in layers) != dora
    assert any("gate_proj" in name for name in layers)
    served.unload_adapter("tuned")
    assert next(iter(served.generate([request]))).token_ids == base.token_ids

    other = made()
    torch.nn.init.normal_(other.model.layers[0].mlp.up_proj.weight, std=0.4)
    names = {name.replace(".base_layer", "").removeprefix("base_model.model."): name for name in served.model.state_dict()}
    served.sync_weights(((names[name], own) for name, own in other.state_dict().items() if name in names), 3)
    (moved,) = served.generate([request])
    expected = other.generate(torch.tensor([PROMPTS[4]]), max_new_tokens=24, do_sample=False, eos_token_id=2**31 - 1)
    assert moved.token_ids == expected[0, len(PROMPTS[4]) :].tolist() != base.token_ids
    assert moved.weight_version == 3
    assert packed_layers(served.model)


@needs_packing
def test_a_packed_layer_still_trains_and_copies() -> None:
    model = made()
    plain = copy.deepcopy(model)
    assert packed.pack(model) == 0
    ids = torch.tensor([PROMPTS[5]])
    for own in (model, plain):
        own.model.embed_tokens.weight.grad = None
        own(ids, labels=ids).loss.backward()
    assert torch.allclose(model.model.embed_tokens.weight.grad, plain.model.embed_tokens.weight.grad, atol=1e-6)
    copied = copy.deepcopy(model)
    assert packed_layers(copied) == []
    assert all(torch.equal(own, plain.state_dict()[name]) for name, own in copied.state_dict().items())
