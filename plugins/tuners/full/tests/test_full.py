"""Which weights are chosen, that the others stay, and that what is saved is a model folder like any other."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from swift_core.config import build_options
from swift_core.errors import RequestError
from swift_core.testing import TunerContract
from swift_core.types import ModelBundle
from swift_plugin_full.config import FullConfig
from swift_plugin_full.tuner import FullTuned
from swift_plugin_transformers.config import TransformersConfig
from swift_plugin_transformers.loading import load_model, load_processor
from swift_plugin_transformers.testing import save_tiny
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

IDS = torch.tensor([[10, 20, 30, 40, 50, 60, 70, 80], [200, 3, 150, 9, 77, 77, 21, 5]])


class TestFull(TunerContract):
    distribution, id = "swift-plugin-full", "full"


class TestLastQuarter(TunerContract):
    distribution, id, options = "swift-plugin-full", "full", {"share": 0.25}


class TestChosenByRegex(TunerContract):
    distribution, id = "swift-plugin-full", "full"
    options = {"only": ["re:layers\\.1\\..*norm", "model.layers.0.mlp"]}  # noqa: RUF012


def tune(bundle: ModelBundle, **options: Any) -> FullTuned:
    config = build_options(FullConfig, options, "tuner.full")
    assert config is not None
    return FullTuned(replace(bundle, model=copy.deepcopy(bundle.model)), config)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits  # type: ignore[no-any-return]


def step(tuned: FullTuned) -> None:
    """One step of plain gradient descent on what is trained."""
    tuned.model(IDS, labels=IDS).loss.backward()
    for parameter in tuned.trainable().values():
        parameter.data -= 0.5 * parameter.grad
        parameter.grad = None


EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        (["model.norm"], {NORM}),
        (["model.layers.1.self_attn.q", "model.norm"], {"model.layers.1.self_attn.q_proj.weight", NORM}),
        ([r"re:layers\.0\..*layernorm"], {f"model.layers.0.{n}_layernorm.weight" for n in ("input", "post_attention")}),
        (
            [r"re:(up|down)_proj", "model.embed"],
            {*(f"model.layers.{n}.mlp.{part}_proj.weight" for n in (0, 1) for part in ("up", "down")), EMBED},
        ),
    ],
)
def test_only_takes_beginnings_and_regexes(tiny_bundle: ModelBundle, only: list[str], expected: set[str]) -> None:
    tuned = tune(tiny_bundle, only=only)
    assert set(tuned.trainable()) == expected
    assert {name for name, parameter in tuned.model.named_parameters() if parameter.requires_grad} == expected
    before = copy.deepcopy(tuned.model.state_dict())
    step(tuned)
    changed = {name for name, tensor in tuned.model.named_parameters() if not torch.equal(tensor, before[name])}
    assert changed == expected


def test_share_is_counted_from_the_output_end(tiny_bundle: ModelBundle) -> None:
    """Whole tensors from the last one back, as long as they fit."""
    sizes = {name: p.numel() for name, p in tiny_bundle.model.named_parameters()}
    whole, order = sum(sizes.values()), list(sizes)
    assert set(tune(tiny_bundle).trainable()) == set(order)
    for share in (0.001, 0.1, 0.3, 0.5, 0.9):
        chosen = set(tune(tiny_bundle, share=share).trainable())
        count = len(chosen)
        assert chosen == set(order[-count:])
        taken = sum(sizes[name] for name in chosen)
        assert taken <= share * whole or count == 1
        assert taken + sizes[order[-count - 1]] > share * whole  # one more would be too much
    assert set(tune(tiny_bundle, share=1e-9).trainable()) == {NORM}  # something is always trained


def test_share_of_what_only_chose(tiny_bundle: ModelBundle) -> None:
    """Three tensors of a layer's MLP, of equal size: two thirds are the later two."""
    chosen = set(tune(tiny_bundle, only=["model.layers.1.mlp"], share=0.67).trainable())
    assert chosen == {f"model.layers.1.mlp.{part}_proj.weight" for part in ("up", "down")}


def test_vectors_are_not_decayed(tiny_bundle: ModelBundle) -> None:
    tuned = tune(tiny_bundle)
    matrices, vectors = tuned.param_groups(SimpleNamespace(weight_decay=0.1))
    assert {p.ndim for p in matrices["params"]} == {2}
    assert {p.ndim for p in vectors["params"]} == {1}
    assert len(matrices["params"]) == 1 + 2 * 7
    assert len(vectors["params"]) == 1 + 2 * 2
    assert "weight_decay" not in matrices
    assert vectors["weight_decay"] == 0.0
    assert tuned.make_optimizer([]) is None


@pytest.mark.parametrize("tied", [True, False])
def test_saved_folder_is_a_model_like_any_other(tmp_path: Path, tied: bool) -> None:
    folder = str(save_tiny(tmp_path / "base", tie_word_embeddings=tied))
    config = TransformersConfig()
    bundle = load_model(folder, load_processor(folder, config), {}, config)
    base = logits(bundle.model)
    tuned = tune(bundle, share=0.5) if tied else tune(bundle)
    step(tuned)
    expected = logits(tuned.model)
    assert float((expected - base).abs().max()) > 1e-3

    out = tmp_path / "saved"
    tuned.save(out)
    again = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits(again), expected)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert AutoTokenizer.from_pretrained(out)("abc").input_ids == bundle.processor("abc").input_ids
    assert AutoTokenizer.from_pretrained(out).chat_template == bundle.processor.chat_template
    assert not {file.suffix for file in out.iterdir()} & {".bin", ".pt", ".pkl"}

    save_file({"0.exp_avg": torch.ones(3)}, out / "optimizer.safetensors")  # a checkpoint holds the backend's files too
    fresh = tune(bundle)
    fresh.load(out)
    assert torch.equal(logits(fresh.model), expected)
    with fresh.disabled():
        assert torch.equal(logits(fresh.model), base)
    assert torch.equal(logits(fresh.model), expected)


def test_disabled_gives_the_source_also_after_an_error(tiny_bundle: ModelBundle) -> None:
    base = logits(tiny_bundle.model)
    tuned = tune(tiny_bundle, only=["model.layers.1", "model.embed"])
    for _ in range(2):  # read once, then kept
        step(tuned)
        expected = logits(tuned.model)
        with tuned.disabled():
            assert torch.equal(logits(tuned.model), base)
        assert torch.equal(logits(tuned.model), expected)
    with pytest.raises(KeyError), tuned.disabled():
        raise KeyError
    assert torch.equal(logits(tuned.model), expected)


def test_a_folder_may_name_the_weights_otherwise(tiny_bundle: ModelBundle, tmp_path: Path) -> None:
    """As those of models with pictures do: LLaVA's language model and head stand under other names in its files."""
    text = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=300
    )
    seen = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=seen)).float()
    source, out = tmp_path / "source", tmp_path / "out"
    model.save_pretrained(source)
    bundle = replace(tiny_bundle, model=model, source=str(source), parts=None)
    assert not set(load_file(source / "model.safetensors")) >= {name for name, _ in model.named_parameters()}
    base = logits(model)
    tuned = FullTuned(bundle, FullConfig(only=["model.language_model", "lm_head"]))
    step(tuned)
    expected = logits(model)
    with tuned.disabled():
        assert torch.equal(logits(model), base)
    tuned.save(out)
    step(tuned)
    tuned.load(out)
    assert torch.equal(logits(model), expected)


def test_merge_is_the_model_itself_frozen(tiny_bundle: ModelBundle) -> None:
    tuned = tune(tiny_bundle)
    step(tuned)
    expected = logits(tuned.model)
    merged = tuned.merge()
    assert torch.equal(logits(merged.model), expected)
    assert not any(parameter.requires_grad for parameter in merged.model.parameters())


def test_what_was_saved_in_another_precision_loads_exactly(tiny_bundle: ModelBundle, tmp_path: Path) -> None:
    """Training keeps fp32 of a bf16 model: a fresh bf16 one takes the fp32 values of what is trained."""
    tuned = tune(tiny_bundle)
    step(tuned)
    tuned.save(tmp_path)
    half = tune(replace(tiny_bundle, model=copy.deepcopy(tiny_bundle.model).to(torch.bfloat16)), only=["model.layers.1"])
    half.load(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    for name, parameter in half.model.named_parameters():
        if "layers.1" in name:
            assert torch.equal(parameter, saved[name])
        else:
            assert parameter.dtype == torch.bfloat16


def test_quantized_weights_are_refused(tiny_bundle: ModelBundle) -> None:
    with pytest.raises(RequestError, match=r"^tuner.full: weights quantized by hqq cannot be trained; use an adapter such as"):
        tune(replace(tiny_bundle, quantization="hqq"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": ["nothing"]}, f"tuner.full: only: 'nothing' matches no parameter; they read like '{EMBED}', '{NORM}'"),
        ({"only": ["norm"]}, "tuner.full: only: 'norm' matches no parameter"),  # a beginning, not a part
        ({"only": ["model.norm", "re:nothing"]}, "tuner.full: only: 're:nothing' matches no parameter; they read like"),
        ({"only": ["re:("]}, r"tuner.full: only: '\(' is not a regular expression: "),
        ({"share": 0.0}, "tuner.full: share must be above 0 and at most 1, not 0.0"),
        ({"share": 1.5}, "tuner.full: share must be above 0 and at most 1, not 1.5"),
    ],
)
def test_wrong_options_are_told(tiny_bundle: ModelBundle, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=f"^{message}"):
        tune(tiny_bundle, **options)


def test_folders_that_do_not_fit(tiny_bundle: ModelBundle, tmp_path: Path) -> None:
    tuned = tune(tiny_bundle)
    with pytest.raises(RequestError, match=rf"^{tmp_path} lacks 20 of the model's weights, {EMBED} first$"):
        tuned.load(tmp_path)
    tuned.save(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if name != NORM}, file)
    with pytest.raises(RequestError, match=rf"^{tmp_path} lacks 1 of the model's weights, {NORM} first$"):
        tuned.load(tmp_path)
    save_file({**tensors, NORM: torch.ones(7)}, file)
    with pytest.raises(RequestError, match=rf"^{tmp_path}: {NORM} has shape \(7,\), the model \(64,\)$"):
        tuned.load(tmp_path)
    file.write_bytes(file.read_bytes()[:999])
    with pytest.raises(RequestError, match=rf"^{file} cannot be read: "):
        tuned.load(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
