"""Quantize, save and restore a tiny Llama: how far the logits move, what stays exact, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hqq.core import quantize as hqq
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from swift_core.config import build_options
from swift_core.errors import RequestError
from swift_core.testing import QuantizerContract
from swift_core.types import ModelBundle
from swift_plugin_hqq.config import HqqConfig
from swift_plugin_hqq.layers import HQQLinear, Settings, linear_layers, matches, quantize
from swift_plugin_hqq.quantizer import HqqQuantizer
from swift_plugin_transformers.config import TransformersConfig
from swift_plugin_transformers.loading import load_model, load_processor
from swift_plugin_transformers.testing import save_tiny

IDS = torch.tensor([[10, 20, 30, 40, 50, 60, 70, 80], [200, 3, 150, 9, 77, 77, 21, 5]])


class TestHqq(QuantizerContract):
    distribution, id = "swift-plugin-hqq", "hqq"


def make(**options: Any) -> HqqQuantizer:
    config = build_options(HqqConfig, options, "quantizer.hqq")
    assert config is not None
    return HqqQuantizer(config)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> ModelBundle:
    """A folder through the generic loader, restored where this quantizer wrote it."""
    config, quantizer = TransformersConfig(), make(bits=8)
    kwargs = {"dtype": dtype, **quantizer.load_kwargs(str(folder))}
    bundle = load_model(str(folder), load_processor(str(folder), config), kwargs, config)
    return quantizer.apply(bundle, str(folder)) if "skeleton" in kwargs else bundle


def logits(bundle: ModelBundle) -> torch.Tensor:
    with torch.no_grad():
        return bundle.model(IDS).logits  # type: ignore[no-any-return]


def error(bundle: ModelBundle, folder: Path) -> float:
    """Distance of the logits from the full model's, relative to their norm."""
    full = logits(load(folder))
    return float((logits(bundle) - full).norm() / full.norm())


def layers(bundle: ModelBundle) -> dict[str, Any]:
    return {name: module for name, module in bundle.model.named_modules() if isinstance(module, hqq.HQQLinear)}


@pytest.mark.parametrize(
    ("bits", "least", "most"),
    [(8, 1e-4, 0.02), (4, 0.03, 0.2), (3, 0.08, 0.4), (2, 0.2, 0.9)],  # seen: 0.005, 0.09, 0.19, 0.46
)
@pytest.mark.parametrize(("axis", "group_size"), [(1, 64), (1, 0), (0, 32)])
def test_error_grows_as_bits_shrink_and_reload_is_exact(
    tiny_folder: Path, tmp_path: Path, bits: int, least: float, most: float, axis: int, group_size: int
) -> None:
    quantizer = make(bits=bits, axis=axis, group_size=group_size)
    bundle = quantizer.apply(load(tiny_folder), str(tiny_folder))
    assert bundle.quantization == "hqq"
    assert len(layers(bundle)) == 14
    assert least < error(bundle, tiny_folder) < most
    quantizer.save(bundle, tmp_path / "small")
    again = load(tmp_path / "small")
    assert again.quantization == "hqq"
    assert torch.equal(logits(again), logits(bundle))


def test_dequantized_weight_is_near(tiny_folder: Path) -> None:
    """The formula of the module docstring, worked out here from the packed integers."""
    linear = load(tiny_folder).model.model.layers[0].mlp.down_proj
    weight = linear.weight.detach().clone()
    layer = quantize(linear, Settings(4, 64, 1, ()), torch.device("cpu"))
    packed = layer.W_q.data
    integers = torch.cat([packed >> 4, packed & 15]).float()
    assert integers.shape == (64 * 128 // 64, 64)
    expected = ((integers - layer.meta["zero"]) * layer.meta["scale"]).reshape(64, 128)
    assert torch.allclose(layer.dequantize(), expected)
    assert float((expected - weight).abs().max()) < float(layer.meta["scale"].max())


def test_folder_is_small_safe_and_complete(tiny_folder: Path, tmp_path: Path) -> None:
    sizes = {}
    for bits in (8, 4, 2):
        quantizer = make(bits=bits, skip=["lm_head"])
        quantizer.save(quantizer.apply(load(tiny_folder), str(tiny_folder)), tmp_path / str(bits))
        sizes[bits] = (tmp_path / str(bits) / "model.safetensors").stat().st_size
    # 73,728 quantized weights: 4 bytes each before, one byte (half, a quarter) after; scales and zeros 9,216 bytes
    saved = (tiny_folder / "model.safetensors").stat().st_size - sizes[8]
    assert saved == pytest.approx(73728 * 3 - 9216, rel=0.05)
    assert sizes[8] - sizes[4] == pytest.approx(73728 / 2, rel=0.05)
    assert sizes[4] - sizes[2] == pytest.approx(73728 / 4, rel=0.05)
    folder = tmp_path / "4"
    assert {file.suffix for file in folder.iterdir()} <= {".safetensors", ".json", ".jinja"}
    assert (folder / "generation_config.json").is_file()
    assert load_processor(str(folder), TransformersConfig())("abc").input_ids
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"
    assert config["quantization_config"] == {
        "quant_method": "hqq", "bits": 4, "group_size": 64, "axis": 1, "skip": ["lm_head"],
        "tied": {"lm_head.weight": "model.embed_tokens.weight"},
    }  # fmt: skip
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert "lm_head.weight" not in names
    assert "model.layers.0.mlp.up_proj.weight" not in names
    assert {f"model.layers.0.mlp.up_proj.{part}" for part in ("W_q", "scale", "zero")} <= names


def test_tied_head_and_rotary_buffers_come_back(tiny_folder: Path, tmp_path: Path) -> None:
    quantizer = make()
    bundle = quantizer.apply(load(tiny_folder), str(tiny_folder))
    quantizer.save(bundle, tmp_path / "small")
    again = load(tmp_path / "small").model
    assert again.lm_head.weight is again.model.embed_tokens.weight
    before, after = dict(load(tiny_folder).model.named_buffers()), dict(again.named_buffers())
    assert before.keys() == after.keys() != set()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not again.training
    assert again.model.norm.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_biases_untied_head_shards_and_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = save_tiny(tmp_path / "full", tie_word_embeddings=False, attention_bias=True)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("bias"):
            tensors[name] = torch.linspace(-1, 1, tensor.numel())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantizer = make(bits=8, shard_size="40KB")
    bundle = quantizer.apply(load(folder, dtype), str(folder))
    layer = layers(bundle)["model.layers.0.self_attn.q_proj"]
    assert layer.compute_dtype is layer.meta["scale"].dtype is layer.bias.dtype is dtype
    assert not any(t.requires_grad or t.is_inference() for t in (layer.bias, layer.meta["zero"], layer.meta["scale"]))
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(bundle.model)(IDS).logits, logits(bundle))
    quantizer.save(bundle, tmp_path / "small")
    files = sorted((tmp_path / "small").glob("model-*.safetensors"))
    assert len(files) > 1
    again = load(tmp_path / "small")  # asked for fp32, saved as `dtype`
    assert torch.equal(logits(again), logits(bundle))
    assert again.model.lm_head.weight.dtype is dtype
    assert again.model.lm_head.weight is not again.model.model.embed_tokens.weight

    quantizer.save(again, tmp_path / "twice")
    make().save(again, tmp_path / "twice")  # in one file, over the shards
    assert [file.name for file in (tmp_path / "twice").glob("model*")] == ["model.safetensors"]
    assert torch.equal(logits(load(tmp_path / "twice")), logits(bundle))
    files[0].unlink()
    with pytest.raises(RequestError, match=f"lacks its weight file {files[0].name}"):
        load(tmp_path / "small")


def test_skip_is_respected(tiny_folder: Path, tmp_path: Path) -> None:
    quantizer = make(skip=["lm_head", "down_proj", "layers.1.self_attn"])
    full = load(tiny_folder).model.state_dict()
    bundle = quantizer.apply(load(tiny_folder), str(tiny_folder))
    names = set(layers(bundle))
    assert len(names) == 14 - 2 - 4
    assert not any("down_proj" in name or "layers.1.self_attn" in name for name in names)
    for name in ("lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"):
        assert torch.equal(bundle.model.get_submodule(name).weight, full[f"{name}.weight"])
    quantizer.save(bundle, tmp_path / "small")
    assert set(layers(load(tmp_path / "small"))) == names


@pytest.mark.parametrize(
    ("name", "pattern", "fits"),
    [
        ("model.layers.0.mlp.up_proj", "up_proj", True),
        ("model.layers.0.mlp.up_proj", "mlp.*_proj", True),
        ("model.layers.0.mlp.up_proj", "layers.0", True),
        ("model.layers.10.mlp.up_proj", "layers.1", False),
        ("model.layers.0.mlp.up_proj", "up", False),
        ("lm_head", "lm_head", True),
    ],
)
def test_patterns(name: str, pattern: str, fits: bool) -> None:
    assert matches(name, pattern) is fits


def test_refuses_what_it_cannot_quantize(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"skip: 'donw_proj' matches no linear layer. Did you mean: down_proj"):
        make(skip=["donw_proj"]).apply(load(tiny_folder), str(tiny_folder))
    with pytest.raises(RequestError, match=r"lm_head shares its weight with model.embed_tokens.weight; add 'lm_head' to skip"):
        make(skip=[]).apply(load(tiny_folder), str(tiny_folder))
    with pytest.raises(RequestError, match=r"group_size: 48 does not divide the 64 inputs of model.layers.0.self_attn.q_proj"):
        make(group_size=48).apply(load(tiny_folder), str(tiny_folder))
    with pytest.raises(RequestError, match=r"has no linear layer to quantize"):
        make(skip=["lm_head", "layers"]).apply(load(tiny_folder), str(tiny_folder))
    odd = torch.nn.Sequential(torch.nn.Linear(64, 3))
    with pytest.raises(RequestError, match=r"bits: 4 bits need groups in multiples of 2, and 0 has 3"):
        linear_layers(odd, Settings(4, 64, 1, ()))
    with pytest.raises(RequestError, match=r"no layer that hqq quantized"):
        make().save(load(tiny_folder), tmp_path / "x")
    bundle = make().apply(load(tiny_folder), str(tiny_folder))
    with pytest.raises(RequestError, match=r"holds the model that was loaded"):
        make().save(bundle, tiny_folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "bits"),
        ({"group_size": 12}, "group_size must be 0 or a multiple of 8"),
        ({"device": "tpu"}, "device must be"),
        ({"shard_size": "5"}, "shard_size must be"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make(**options)


@pytest.fixture
def small(tiny_folder: Path, tmp_path: Path) -> Path:
    quantizer = make()
    quantizer.save(quantizer.apply(load(tiny_folder), str(tiny_folder)), tmp_path / "small")
    return tmp_path / "small"


def edit_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_damaged_folders_are_refused(small: Path) -> None:
    whole = (small / "model.safetensors").read_bytes()
    layer = "model.layers.1.mlp.up_proj"

    for name in (f"{layer}.zero", f"{layer}.W_q", "model.norm.weight"):
        edit_tensors(small, lambda tensors, name=name: tensors.pop(name))
        with pytest.raises(RequestError, match=rf"lacks 1 of its tensors, {name} first"):
            load(small)
        (small / "model.safetensors").write_bytes(whole)

    edit_tensors(small, lambda tensors: tensors.update({f"{layer}.scale": torch.ones(3, 1)}))
    with pytest.raises(RequestError, match=rf"{layer}.scale has shape \(3, 1\), and its config.json asks for \(128, 1\)"):
        load(small)

    edit_tensors(small, lambda tensors: tensors.update({f"{layer}.scale": torch.ones(128, 1), "extra": torch.ones(1)}))
    with pytest.raises(RequestError, match=r"holds 1 tensors that its config.json has no place for: extra"):
        load(small)

    (small / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RequestError, match="is truncated or damaged"):
        load(small)
    (small / "model.safetensors").unlink()
    with pytest.raises(RequestError, match=r"lacks its weight file model.safetensors"):
        load(small)


def test_other_quantizations_are_refused(small: Path) -> None:
    assert make().load_kwargs(str(small)) == {"skeleton": True}
    file = small / "config.json"
    config = json.loads(file.read_text())
    del config["quantization_config"]["bits"]
    file.write_text(json.dumps(config))
    with pytest.raises(RequestError, match=r"no 'bits': another program wrote it"):
        make().load_kwargs(str(small))
    config["quantization_config"] = {"quant_method": "gptq"}
    file.write_text(json.dumps(config))
    with pytest.raises(RequestError, match="quantized by gptq already"):
        make().load_kwargs(str(small))
    del config["quantization_config"]
    file.write_text(json.dumps(config))
    assert make().load_kwargs(str(small)) == {}
    assert make().load_kwargs("some-org/some-model") == {}


def test_model_moves_and_copies_whole(small: Path) -> None:
    bundle = load(small)
    expected = logits(bundle)
    copied = copy.deepcopy(bundle.model)
    bundle.model.to(torch.bfloat16)
    layer = layers(bundle)["model.layers.0.mlp.up_proj"]
    assert layer.meta["scale"].dtype is layer.meta["zero"].dtype is layer.compute_dtype is torch.bfloat16
    assert layer.W_q.dtype is torch.uint8
    moved = logits(bundle)
    assert moved.dtype is torch.bfloat16
    assert torch.allclose(moved.float(), expected, atol=0.05)
    with torch.no_grad():
        assert torch.equal(copied(IDS).logits, expected)


def test_fused_experts_are_warned_of() -> None:
    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = torch.nn.Linear(64, 8)
            self.weight = torch.nn.Parameter(torch.zeros(4, 8, 64))

    with pytest.warns(UserWarning, match="2048 weights of fused experts"):
        linear_layers(Experts(), Settings(8, 64, 1, ()))


@pytest.mark.parametrize("restored", [False, True])
def test_lora_trains_on_top(tmp_path: Path, restored: bool) -> None:
    peft = pytest.importorskip("peft")
    folder = save_tiny(tmp_path / "full", attention_bias=True)
    quantizer = make(bits=4)
    bundle = quantizer.apply(load(folder), str(folder))
    if restored:
        quantizer.save(bundle, tmp_path / "small")
        bundle = load(tmp_path / "small")
    frozen = {name: tensor.clone() for name, tensor in bundle.model.named_parameters() if "W_q" not in name}
    before = {name: layer.dequantize().clone() for name, layer in layers(bundle).items()}
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(bundle.model, config)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 3 * 2
    assert all("lora_" in name for name in trained)
    assert type(model.base_model.model.model.layers[0].self_attn.q_proj).__name__ == "HqqLoraLinear"
    optimizer = torch.optim.AdamW(trained.values(), lr=0.02)
    losses = []
    for _ in range(4):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        assert all(p.grad is not None for p in trained.values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[3] < losses[0] - 0.1
    with model.disable_adapter(), torch.no_grad():
        assert model(IDS, labels=IDS).loss.item() == pytest.approx(losses[0])
    base = model.unload()
    assert all(torch.equal(dict(base.named_parameters())[name], tensor) for name, tensor in frozen.items())
    assert all(torch.equal(base.get_submodule(name).dequantize(), weight) for name, weight in before.items())


def test_merged_adapter_can_be_saved(tiny_folder: Path, tmp_path: Path) -> None:
    """peft's merge puts hqq's own layers in the place of ours."""
    peft = pytest.importorskip("peft")
    quantizer = make(bits=8, group_size=0)
    bundle = quantizer.apply(load(tiny_folder), str(tiny_folder))
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    bundle.model = peft.get_peft_model(bundle.model, config).merge_and_unload()
    merged = layers(bundle)["model.layers.0.self_attn.q_proj"]
    assert type(merged) is not HQQLinear
    quantizer.save(bundle, tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged")), logits(bundle))
