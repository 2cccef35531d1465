"""LoRA against its formula worked out by hand, against plain peft, and against itself after saving and loading."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from swift_core.config import build_options
from swift_core.errors import RequestError
from swift_core.testing import TunerContract
from swift_core.types import ModelBundle
from swift_plugin_lora.config import LoraConfig
from swift_plugin_lora.tuner import LoraTuned, all_linear
from swift_plugin_transformers.config import TransformersConfig
from swift_plugin_transformers.loading import load_model, load_processor
from swift_plugin_transformers.testing import save_tiny
from transformers import AutoModelForCausalLM, BlipConfig, BlipForConditionalGeneration

IDS = torch.tensor([[10, 20, 30, 40, 50, 60, 70, 80], [200, 3, 150, 9, 77, 77, 21, 5]])
INITS = ["default", "gaussian", "pissa", "olora", "orthogonal"]
VARIANTS: list[dict[str, Any]] = [
    *({"init": init} for init in INITS), {"rslora": True}, {"dora": True}, {"dora": True, "init": "pissa"},
    {"save_modules": ["lm_head"]}, {"targets": ["embed_tokens", "q_proj"]}, {"targets": ["all-linear", "lm_head"]},
]  # fmt: skip
variants = pytest.mark.parametrize("options", VARIANTS, ids=lambda options: json.dumps(options).strip("{}").replace('"', ""))


class TestLora(TunerContract):
    distribution, id, options = "swift-plugin-lora", "lora", {"rank": 4}


class TestPissaWithDora(TunerContract):
    distribution, id = "swift-plugin-lora", "lora"
    options = {"rank": 4, "init": "pissa", "dora": True, "rslora": True, "targets": ["q_proj", "down_proj"]}  # noqa: RUF012


class TestSavedModule(TunerContract):
    distribution, id, options = "swift-plugin-lora", "lora", {"save_modules": ["lm_head"], "targets": ["v_proj"]}


def tune(bundle: ModelBundle, seed: int = 0, **options: Any) -> LoraTuned:
    """LoRA on a copy of the bundle's model."""
    config = build_options(LoraConfig, options, "tuner.lora")
    assert config is not None
    torch.manual_seed(seed)
    copied = ModelBundle(copy.deepcopy(bundle.model), bundle.processor, bundle.source, quantization=bundle.quantization)
    return LoraTuned(copied, config)


def move(tuned: LoraTuned) -> LoraTuned:
    """Move all that is trained away from its start."""
    generator = torch.Generator().manual_seed(1)
    for parameter in tuned.trainable().values():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return tuned


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits  # type: ignore[no-any-return]


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


@variants
def test_every_variant_begins_as_the_base_and_comes_back_exactly(
    tiny_bundle: ModelBundle, tmp_path: Path, options: dict[str, Any]
) -> None:
    base = logits(tiny_bundle.model)
    tuned = tune(tiny_bundle, **options)
    assert gap(logits(tuned.model), base) < 2e-6
    expected = logits(move(tuned).model)
    assert gap(expected, base) > 0.02
    with tuned.disabled():
        assert gap(logits(tuned.model), base) < 2e-6
    assert torch.equal(logits(tuned.model), expected)

    tuned.save(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    fresh = tune(tiny_bundle, seed=5, **options)
    fresh.load(tmp_path)
    assert torch.equal(logits(fresh.model), expected)
    with fresh.disabled():
        assert gap(logits(fresh.model), base) < 2e-6

    plain = peft.PeftModel.from_pretrained(copy.deepcopy(tiny_bundle.model), tmp_path)
    assert gap(logits(plain), expected) < 2e-6  # peft's own layer multiplies in another order


@variants
def test_merged_folder_equals_unmerged(tiny_bundle: ModelBundle, tmp_path: Path, options: dict[str, Any]) -> None:
    """Also where the output head shares its weight with the embedding, and only one of the two is tuned."""
    tuned = move(tune(tiny_bundle, **options))
    expected = logits(tuned.model)
    merged = tuned.merge()
    assert not isinstance(merged.model, peft.PeftModel)
    assert gap(logits(merged.model), expected) < 1e-5
    assert not any(parameter.requires_grad for parameter in merged.model.parameters())
    merged.model.save_pretrained(tmp_path)
    assert gap(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected) < 1e-5


@variants
def test_weights_for_an_engine_are_the_merged_ones(tiny_bundle: ModelBundle, options: dict[str, Any]) -> None:
    tuned = move(tune(tiny_bundle, **options))
    before = logits(tuned.model)
    given = {name: tensor.clone() for name, tensor in tuned.weights()}
    assert torch.equal(logits(tuned.model), before)
    merged = tuned.merge().model.state_dict()
    assert given.keys() == merged.keys()
    assert all(torch.equal(given[name], tensor) for name, tensor in merged.items())


@pytest.mark.parametrize(("rslora", "scale"), [(False, 16 / 4), (True, 16 / math.sqrt(4))])
def test_the_update_is_scale_times_b_a(tiny_bundle: ModelBundle, rslora: bool, scale: float) -> None:
    """W + alpha / rank B A, or alpha / sqrt(rank), added by hand to each weight of the base."""
    tuned = move(tune(tiny_bundle, rank=4, alpha=16, rslora=rslora, targets=["q_proj", "up_proj"]))
    parts = {name: parameter.detach() for name, parameter in tuned.trainable().items()}
    base = copy.deepcopy(tiny_bundle.model)
    pairs = 0
    for name, module in base.named_modules():
        if name.endswith(("q_proj", "up_proj")):
            a = parts[f"base_model.model.{name}.lora_A.default.weight"]
            b = parts[f"base_model.model.{name}.lora_B.default.weight"]
            assert (a.shape, b.shape) == ((4, module.in_features), (module.out_features, 4))
            module.weight.data += scale * b @ a
            pairs += 1
    assert (pairs, len(parts)) == (4, 8)
    assert gap(logits(tuned.model), logits(base)) < 1e-5


def test_dora_trains_magnitude_and_direction(tiny_bundle: ModelBundle) -> None:
    """W' = m (W + s B A) / |W + s B A|, the norm of each row (Liu et al. 2024, equation 5)."""
    tuned = move(tune(tiny_bundle, rank=4, alpha=8, dora=True, targets=["o_proj"]))
    parts = {name: parameter.detach() for name, parameter in tuned.trainable().items()}
    assert len(parts) == 2 * 3
    base = copy.deepcopy(tiny_bundle.model)
    for number, layer in enumerate(base.model.layers):
        prefix = f"base_model.model.model.layers.{number}.self_attn.o_proj.lora_"
        whole = layer.self_attn.o_proj.weight.data + 2 * parts[f"{prefix}B.default.weight"] @ parts[f"{prefix}A.default.weight"]
        magnitude = parts[f"{prefix}magnitude_vector.default.weight"]
        layer.self_attn.o_proj.weight.data = magnitude[:, None] * whole / whole.norm(dim=1, keepdim=True)
    assert gap(logits(tuned.model), logits(base)) < 1e-5


def test_first_values_of_each_init(tiny_bundle: ModelBundle) -> None:
    """What the inits say of A and B, on one weight."""
    weight = tiny_bundle.model.model.layers[0].mlp.up_proj.weight.detach()
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.default.weight"

    def parts(init: str) -> tuple[torch.Tensor, torch.Tensor]:
        found = tune(tiny_bundle, rank=4, alpha=4, init=init, targets=["up_proj"]).trainable()
        return found[name.format("A")].detach(), found[name.format("B")].detach()

    for init in ("default", "gaussian"):
        a, b = parts(init)
        assert not b.any()
        assert a.any()
    assert parts("gaussian")[0].std() == pytest.approx(1 / 4, rel=0.2)  # N(0, 1 / rank)
    assert float(parts("default")[0].abs().max()) <= 1 / math.sqrt(64)  # Kaiming uniform, 64 inputs
    a, b = parts("pissa")
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    assert torch.allclose(b @ a, (u[:, :4] * s[:4]) @ v[:4], atol=1e-5)  # the four largest singular values
    a, b = parts("olora")
    assert torch.allclose(b.T @ b, torch.eye(4), atol=1e-5)
    a, b = parts("orthogonal")
    assert torch.allclose(b @ a, torch.zeros_like(weight), atol=1e-6)
    assert b.any()


def test_dropout_falls_on_the_adapter_only(tiny_bundle: ModelBundle) -> None:
    tuned = move(tune(tiny_bundle, dropout=0.5))
    tuned.model.train()
    with torch.no_grad():
        assert gap(tuned.model(IDS).logits, tuned.model(IDS).logits) > 1e-3
        with tuned.disabled():
            assert torch.equal(tuned.model(IDS).logits, tuned.model(IDS).logits)


def test_lora_plus_gives_b_its_ratio(tiny_bundle: ModelBundle) -> None:
    config = SimpleNamespace(learning_rate=1e-3, weight_decay=0.0)
    tuned = tune(tiny_bundle, plus_ratio=16.0, targets=["q_proj", "embed_tokens"], save_modules=["lm_head"])
    names = {id(parameter): name for name, parameter in tuned.trainable().items()}
    slow, fast = tuned.param_groups(config)
    assert "lr_scale" not in slow
    assert fast["lr_scale"] == 16
    is_b = {name: "lora_B" in name or "lora_embedding_B" in name for name in names.values()}
    assert sorted(names[id(p)] for p in fast["params"]) == sorted(name for name, b in is_b.items() if b)
    assert sorted(names[id(p)] for p in slow["params"]) == sorted(name for name, b in is_b.items() if not b)
    assert len(fast["params"]) == 3
    (whole,) = tune(tiny_bundle).param_groups(config)
    assert "lr_scale" not in whole
    assert len(whole["params"]) == 28


@pytest.mark.parametrize("init", [True, "pissa_niter_8"])
def test_like_takes_the_options_of_another_tools_adapter(tiny_bundle: ModelBundle, tmp_path: Path, init: Any) -> None:
    """Also those that this tuner has no option for: a rank and a scale of its own for one layer."""
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 5}, alpha_pattern={"down_proj": 11},
        layers_to_transform=[1], init_lora_weights=init, task_type="CAUSAL_LM",
    )  # fmt: skip
    torch.manual_seed(0)
    plain = peft.get_peft_model(copy.deepcopy(tiny_bundle.model), config)
    for name, parameter in plain.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    plain.save_pretrained(tmp_path)
    tuned = tune(tiny_bundle, like=str(tmp_path), rank=64)
    tuned.load(tmp_path)
    assert gap(logits(tuned.model), logits(plain)) < 1e-5  # a random SVD begins PiSSA nearly alike
    assert len(tuned.trainable()) == 4
    with tuned.disabled():
        assert gap(logits(tuned.model), logits(tiny_bundle.model)) < 2e-6
    expected = logits(tuned.model)
    assert gap(logits(tuned.merge().model), expected) < 1e-5


def test_like_needs_a_lora_adapter(tiny_bundle: ModelBundle, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=rf"^tuner.lora.like: {tmp_path} cannot be read: "):
        tune(tiny_bundle, like=str(tmp_path))
    other = peft.get_peft_model(copy.deepcopy(tiny_bundle.model), peft.VeraConfig(r=4, target_modules=["q_proj"]))
    other.save_pretrained(tmp_path)
    with pytest.raises(RequestError, match=rf"^tuner.lora.like: {tmp_path} holds a VERA adapter, not a LoRA one$"):
        tune(tiny_bundle, like=str(tmp_path))


# --- targets ----------------------------------------------------------------------------------------------------------


def adapted(tuned: LoraTuned) -> set[str]:
    """Full names of the layers with an adapter."""
    return {name.partition(".lora_")[0].removeprefix("base_model.model.") for name in tuned.trainable() if ".lora_" in name}


LINEAR = {
    f"model.layers.{layer}.{name}"
    for layer in (0, 1)
    for name in (
        *(f"self_attn.{part}_proj" for part in "qkvo"), *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
    )
}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, LINEAR),
        ({"targets": ["q_proj", "layers.1.mlp.up_proj"]}, {n for n in LINEAR if "q_proj" in n or "1.mlp.up" in n}),
        ({"targets": [r"re:.*layers\.1\.(self_attn|mlp)\..*_proj"]}, {name for name in LINEAR if ".1." in name}),
        ({"exclude": ["q_proj", "layers.0.mlp.down_proj"]}, {n for n in LINEAR if "q_proj" not in n and "0.mlp.down" not in n}),
        ({"targets": ["all-linear", "lm_head"]}, {*LINEAR, "lm_head"}),
        ({"targets": ["embed_tokens"]}, {"model.embed_tokens"}),
    ],
)
def test_targets(tiny_bundle: ModelBundle, options: dict[str, Any], expected: set[str]) -> None:
    assert adapted(tune(tiny_bundle, **options)) == expected


def test_all_linear_leaves_an_untied_head_out(tmp_path: Path) -> None:
    folder = str(save_tiny(tmp_path / "untied", tie_word_embeddings=False))
    bundle = load_model(folder, load_processor(folder, TransformersConfig()), {}, TransformersConfig())
    assert set(all_linear(bundle.model)) == LINEAR


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"init": "gaussian"}])
def test_all_linear_of_quantized_weights(tiny_bundle: ModelBundle, tmp_path: Path, options: dict[str, Any]) -> None:
    pytest.importorskip("hqq")
    from swift_plugin_hqq.config import HqqConfig
    from swift_plugin_hqq.quantizer import HqqQuantizer

    bundle = HqqQuantizer(HqqConfig(bits=8)).apply(tiny_bundle, tiny_bundle.source)
    base = logits(bundle.model)
    tuned = tune(bundle, **options)
    assert adapted(tuned) == LINEAR
    assert gap(logits(tuned.model), base) < 1e-5
    expected = logits(move(tuned).model)
    assert gap(expected, base) > 0.02
    tuned.save(tmp_path)
    fresh = tune(bundle, **options)
    fresh.load(tmp_path)
    assert torch.equal(logits(fresh.model), expected)
    for init in ("pissa", "olora", "orthogonal"):
        with pytest.raises(RequestError, match=rf"tuner.lora: init: {init} is made from the weights, which hqq has quantized"):
            tune(bundle, init=init)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["nothing"]}, r"targets \['nothing'\] match no layer of the model. "),
        ({"targets": ["q_proj", "v_porj"]}, r"targets \['v_porj'\] match no layer of the model. "),  # one of them is right
        ({"targets": ["re:nothing"]}, r"targets \['re:nothing'\] match no layer of the model. "),
        ({"exclude": ["nothing"]}, r"exclude \['nothing'\] match no layer of the model. "),
        ({"save_modules": ["nothing"]}, r"save_modules \['nothing'\] match no layer of the model. "),
        ({"targets": ["q_proj"], "exclude": ["q_proj"]}, r"targets \['q_proj'\] match no layer of the model. "),
    ],
)
def test_wrong_names_are_told_with_the_linear_layers(tiny_bundle: ModelBundle, options: dict[str, Any], message: str) -> None:
    layers = "Its linear layers: down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    with pytest.raises(RequestError, match=rf"^tuner.lora: {message}{layers}$"):
        tune(tiny_bundle, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["norm"]}, "Target module LlamaRMSNorm.* is not supported"),
        ({"init": "orthogonal", "rank": 3}, "Orthogonal initialization requires the LoRA rank to be even"),
        ({"init": "pissa", "targets": ["lm_head"]}, "init: pissa cannot take the output head, which is the embedding as well"),
        ({"rank": 0}, "rank must be at least 1, not 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"plus_ratio": 0.0}, "plus_ratio must be above 0"),
        ({"targets": []}, "targets is empty"),
        ({"targets": ["re:("]}, r"targets: '\(' is not a regular expression"),
        ({"targets": ["q_proj", "re:.*"]}, "targets: a regex stands alone"),
    ],
)
def test_wrong_options_are_told_in_one_line(tiny_bundle: ModelBundle, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=rf"^tuner.lora: {message}") as caught:
        tune(tiny_bundle, **options)
    assert "\n" not in str(caught.value)


# --- saving and loading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("saved", "options", "reason"),
    [
        ({"rank": 4}, {"rank": 8}, r"lora_A.weight has shape \(4, \d+\), not \(8, \d+\)"),
        ({"rank": 4}, {"rank": 4, "targets": ["q_proj"]}, "lora_A.weight is in one of the two only"),
        ({"targets": ["q_proj"]}, {}, "lora_A.weight is in one of the two only"),
        ({}, {"dora": True}, "lora_magnitude_vector is in one of the two only"),
        ({}, {"save_modules": ["lm_head"]}, "base_model.model.lm_head.weight is in one of the two only"),
        ({"save_modules": ["lm_head"]}, {}, "base_model.model.lm_head.weight is in one of the two only"),
    ],
)
def test_an_adapter_of_other_options_is_refused(
    tiny_bundle: ModelBundle, tmp_path: Path, saved: dict[str, Any], options: dict[str, Any], reason: str
) -> None:
    move(tune(tiny_bundle, **saved)).save(tmp_path)
    tuned = tune(tiny_bundle, **options)
    before = logits(tuned.model)
    file = tmp_path / "adapter_model.safetensors"
    with pytest.raises(RequestError, match=rf"^{file} does not fit tuner.lora's options: .*{reason}$") as caught:
        tuned.load(tmp_path)
    assert "\n" not in str(caught.value)
    assert torch.equal(logits(tuned.model), before)  # nothing was loaded by halves


def test_a_damaged_adapter_is_refused(tiny_bundle: ModelBundle, tmp_path: Path) -> None:
    tuned, file = tune(tiny_bundle), tmp_path / "adapter_model.safetensors"
    with pytest.raises(RequestError, match=rf"^{file} cannot be read: "):
        tuned.load(tmp_path)
    move(tuned).save(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RequestError, match=rf"^{file} cannot be read: "):
        tuned.load(tmp_path)
    file.write_bytes(whole)
    tensors = load_file(file)
    tensors.pop("base_model.model.model.layers.1.mlp.up_proj.lora_B.weight")
    save_file(tensors, file)
    with pytest.raises(RequestError, match=r"layers.1.mlp.up_proj.lora_B.weight is in one of the two only"):
        tuned.load(tmp_path)


def test_saved_config_names_base_and_settings(tiny_bundle: ModelBundle, tmp_path: Path) -> None:
    tune(tiny_bundle, rank=3, alpha=5.0, rslora=True, targets=["q_proj"]).save(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == tiny_bundle.source
    assert (saved["peft_type"], saved["r"], saved["lora_alpha"], saved["use_rslora"]) == ("LORA", 3, 5.0, True)
    assert (saved["target_modules"], saved["task_type"]) == (["q_proj"], "CAUSAL_LM")
    shapes = {name: tuple(t.shape) for name, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    prefix = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    assert shapes == {prefix.format(layer, part): shape for layer in (0, 1) for part, shape in (("A", (3, 64)), ("B", (64, 3)))}


def test_the_start_depends_on_the_seed_alone(tiny_bundle: ModelBundle) -> None:
    """A resumed run begins with the adapter that it began with, whatever drew random numbers before."""
    config = LoraConfig()

    def first(seed: int, drawn: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        torch.rand(drawn)
        before = torch.get_rng_state()
        tuned = LoraTuned(ModelBundle(copy.deepcopy(tiny_bundle.model), None, "base"), config)
        assert torch.equal(torch.get_rng_state(), before)
        return {name: parameter.detach() for name, parameter in tuned.trainable().items()}

    one, same, other = first(3, 0), first(3, 17), first(4, 0)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_a_model_that_takes_no_embeddings_and_names_no_head(tmp_path: Path) -> None:
    """BLIP: what peft wraps around a task would hand it `inputs_embeds`, and its output head, which it does not call its own,
    shares its weight with the embedding."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 256, "encoder_hidden_size": 32, "hidden_dropout_prob": 0.0}
    config = BlipConfig(text_config=text, vision_config={**sizes, "image_size": 16, "patch_size": 8})
    torch.manual_seed(0)
    model = BlipForConditionalGeneration(config).eval()
    tuned = tune(ModelBundle(model, None, "blip"))
    assert not [name for name in tuned.trainable() if "predictions.decoder" in name]
    move(tuned)

    def told(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(pixel_values=torch.ones(2, 3, 16, 16), input_ids=IDS).logits  # type: ignore[no-any-return]

    expected = told(tuned.model)
    assert gap(expected, told(model)) > 0.01
    tuned.save(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] is None
    fresh = tune(ModelBundle(model, None, "blip"), seed=5)
    fresh.load(tmp_path)
    assert torch.equal(told(fresh.model), expected)
    assert gap(told(tuned.merge().model), expected) < 1e-5
