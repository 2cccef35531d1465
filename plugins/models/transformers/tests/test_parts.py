"""The parts of real models, and what freezing, rates and tuners do with them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from swift_core.config import Component, RunConfig
from swift_core.errors import RequestError
from swift_core.session import Session
from swift_core.types import ModelBundle, ModelParts
from swift_plugin_full.config import FullConfig
from swift_plugin_full.tuner import FullTuned
from swift_plugin_lora.config import LoraConfig
from swift_plugin_lora.tuner import LoraTuned
from swift_plugin_transformers.parts import WHOLE, find_parts

_spec = importlib.util.spec_from_file_location("tiny_media", Path(__file__).parent / "tiny_media.py")
assert _spec is not None
assert _spec.loader is not None
tiny_media = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny_media)

EXPECTED: dict[str, dict[str, tuple[str, ...]]] = {
    "llava": {
        "language": ("model.language_model", "lm_head"), "vision": ("model.vision_tower",),
        "projector": ("model.multi_modal_projector",),
        "embeddings": ("model.language_model.embed_tokens",), "head": ("lm_head",),
    },
    "qwen2_vl": {
        "language": ("model.language_model", "lm_head"), "vision": ("model.visual",), "projector": ("model.visual.merger",),
        "embeddings": ("model.language_model.embed_tokens",), "head": ("lm_head",),
    },
    "idefics3": {
        "language": ("model.text_model", "lm_head"), "vision": ("model.vision_model",), "projector": ("model.connector",),
        "embeddings": ("model.text_model.embed_tokens",), "head": ("lm_head",),
    },
    "smolvlm": {
        "language": ("model.text_model", "lm_head"), "vision": ("model.vision_model",), "projector": ("model.connector",),
        "embeddings": ("model.text_model.embed_tokens",), "head": ("lm_head",),
    },
    "qwen2_audio": {
        "language": ("model.language_model", "lm_head"), "audio": ("model.audio_tower",),
        "projector": ("model.multi_modal_projector",),
        "embeddings": ("model.language_model.embed_tokens",), "head": ("lm_head",),
    },
    "paligemma": {
        "language": ("model.language_model", "lm_head"), "vision": ("model.vision_tower",),
        "projector": ("model.multi_modal_projector",),
        "embeddings": ("model.language_model.embed_tokens",), "head": ("lm_head",),
    },
    "gemma3": {
        "language": ("model.language_model", "lm_head"), "vision": ("model.vision_tower",),
        "projector": ("model.multi_modal_projector",),
        "embeddings": ("model.language_model.embed_tokens",), "head": ("lm_head",),
    },
    "qwen3_moe": {
        "language": ("",), "embeddings": ("model.embed_tokens",), "head": ("lm_head",),
        "experts": ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts"),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", list(EXPECTED))
def test_parts_of_a_family(name: str) -> None:
    model = tiny_media.make(name)
    parts = find_parts(model)
    assert isinstance(parts, ModelParts)
    assert {part: set(found) for part, found in parts.prefixes.items()} == {p: set(n) for p, n in EXPECTED[name].items()}
    owners = [parts.of(weight) & set(WHOLE) for weight, _ in model.named_parameters()]
    assert all(len(found) == 1 for found in owners), "each weight has one owner"


def bundle_of(name: str) -> ModelBundle:
    model = tiny_media.make(name)
    return ModelBundle(model, None, "nowhere", type(model).__name__, parts=find_parts(model))


def owners(bundle: ModelBundle, names: Any) -> set[str]:
    assert bundle.parts is not None
    return {part for name in names for part in bundle.parts.of(name) if part in WHOLE}


def tune(bundle: ModelBundle, tuner: str, freeze: list[str], **options: Any) -> Any:
    """As a run does it."""
    config = RunConfig(freeze=freeze)
    with Session(config) as session:
        tuned = session.tuned(bundle, Component(tuner, options=options), freeze)
        session._freeze(tuned, bundle)
    return tuned


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "idefics3", "qwen2_audio"])
def test_adapters_go_on_the_language_model_alone_unless_asked(name: str) -> None:
    bundle = bundle_of(name)
    assert owners(bundle, tune(bundle, "lora", []).trainable()) == {"language"}
    bundle = bundle_of(name)
    assert owners(bundle, tune(bundle, "lora", [], parts=["language", "projector"]).trainable()) == {"language", "projector"}
    bundle = bundle_of(name)
    tower = "audio" if name == "qwen2_audio" else "vision"
    tuned = tune(bundle, "lora", ["projector"], parts=["projector", tower])
    assert owners(bundle, tuned.trainable()) == {tower}
    assert not any("lora" in weight for weight, _ in tuned.model.named_parameters() if bundle.parts.of(weight) & {"projector"})


def test_a_named_layer_is_taken_wherever_it_is_but_in_frozen_parts() -> None:
    bundle = bundle_of("llava")
    assert owners(bundle, tune(bundle, "lora", [], targets=["q_proj"]).trainable()) == {"language", "vision"}
    bundle = bundle_of("llava")
    assert owners(bundle, tune(bundle, "lora", ["vision"], targets=["q_proj"]).trainable()) == {"language"}
    bundle = bundle_of("llava")
    tuned = tune(bundle, "lora", ["language"], targets=[r"re:.*\.(q_proj|linear_1)"])
    assert owners(bundle, tuned.trainable()) == {"vision", "projector"}
    with pytest.raises(RequestError, match=r"no layer of \['linear_1'\] lies in the parts .* without projector$"):
        tune(bundle_of("llava"), "lora", ["projector"], targets=["linear_1"])


@pytest.mark.parametrize("frozen", [["vision"], ["projector"], ["language"], ["vision", "language"]])
def test_full_leaves_frozen_parts_untouched(frozen: list[str]) -> None:
    bundle = bundle_of("llava")
    tuned = tune(bundle, "full", frozen)
    assert owners(bundle, tuned.trainable()) == {"vision", "projector", "language"} - set(frozen)
    before = {name: weight.detach().clone() for name, weight in tuned.model.named_parameters()}
    ids = torch.tensor([[5, *[98] * 16, 7, 8, 9]])
    optimizer = torch.optim.SGD([{"params": g["params"]} for g in tuned.param_groups(SimpleNamespace())], lr=0.5)
    pictures = torch.randn(1, 3, 16, 16)
    loss = tuned.model(input_ids=ids, pixel_values=pictures, labels=ids).loss
    loss.backward()
    assert owners(bundle, [name for name, weight in tuned.model.named_parameters() if weight.grad is not None]) == (
        {"vision", "projector", "language"} - set(frozen)
    )
    optimizer.step()
    changed = {name for name, weight in tuned.model.named_parameters() if not torch.equal(before[name], weight)}
    assert owners(bundle, changed) == {"vision", "projector", "language"} - set(frozen)


def test_a_frozen_tower_runs_without_autograd() -> None:
    bundle = bundle_of("llava")
    tuned = tune(bundle, "full", ["vision"])
    seen = []
    tuned.model.model.vision_tower.register_forward_hook(lambda module, args, out: seen.append(out[0].requires_grad))
    tuned.model(input_ids=torch.tensor([[5, *[98] * 16]]), pixel_values=torch.randn(1, 3, 16, 16))
    assert seen == [False]


def test_full_trains_the_parts_asked_for() -> None:
    bundle = bundle_of("qwen2_vl")
    assert owners(bundle, tune(bundle, "full", []).trainable()) == {"vision", "projector", "language"}
    bundle = bundle_of("qwen2_vl")
    trained = tune(bundle, "full", [], parts=["projector"]).trainable()
    assert set(trained) == {name for name, _ in bundle.model.named_parameters() if name.startswith("model.visual.merger.")}
    bundle = bundle_of("qwen3_moe")
    assert all(".mlp.experts." in name for name in tune(bundle, "full", [], parts=["experts"]).trainable())
    bundle = bundle_of("qwen3_moe")
    assert not any("embed_tokens" in name for name in tune(bundle, "full", ["embeddings"]).trainable())


def test_rates_are_factors_of_the_learning_rate() -> None:
    bundle = bundle_of("llava")
    tuned = FullTuned(bundle, FullConfig())
    groups = tuned.param_groups(SimpleNamespace(rates={"vision": 0.1, "language": 0.5, "head": 2.0}))
    names = {id(weight): name for name, weight in bundle.model.named_parameters()}
    for group in groups:
        for weight in group["params"]:
            name = names[id(weight)]
            expected = 2.0 if name.startswith("lm_head") else 0.1 if "vision" in name else 0.5 if "language" in name else 1.0
            assert group["lr_scale"] == expected, name
            assert group.get("weight_decay") == (0.0 if weight.ndim == 1 else None)
    assert sum(len(group["params"]) for group in groups) == len(names)
    adapters = LoraTuned(bundle_of("llava"), LoraConfig(plus_ratio=16.0, parts=["vision", "language"]))
    scales = {group["lr_scale"] for group in adapters.param_groups(SimpleNamespace(rates={"vision": 0.1}))}
    assert sorted(scales) == [0.1, 1.0, pytest.approx(1.6), 16.0]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda b: FullTuned(b, FullConfig(parts=["audio"])), "tuner.full.parts: the model has no part 'audio'; its parts: "),
        (lambda b: LoraTuned(b, LoraConfig(parts=["audio"])), "tuner.lora.parts: the model has no part 'audio'; its parts: "),
        (lambda b: FullTuned(b, FullConfig()).param_groups(SimpleNamespace(rates={"audio": 0.1})), "trainer.rates: .* 'audio'"),
        (
            lambda b: FullTuned(b, FullConfig(parts=["vision"])).param_groups(SimpleNamespace(rates={"language": 0.1})),
            "trainer.rates: nothing of the part 'language' is trained",
        ),
        (
            lambda b: tune(b, "full", ["audio"]),
            "freeze: no trained parameter's name begins with 'audio'; .* the model's parts: ",
        ),
        (lambda b: tune(b, "full", ["vision", "projector", "language"]), "nothing is trained"),
    ],
)
def test_a_part_that_is_not_there_is_told(act: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        act(bundle_of("llava"))
    assert "\n" not in str(caught.value)
    if "its parts" in message:
        assert "language, vision, projector, embeddings, head" in str(caught.value)


def test_a_familys_own_names_go_first() -> None:
    model = tiny_media.make("llava")
    parts = find_parts(model, {"projector": ["model.multi_modal_projector.linear_2"], "experts": [r"re:.*\.mlp"]})
    assert parts.of("model.multi_modal_projector.linear_2.weight") == {"projector"}
    assert parts.of("model.multi_modal_projector.linear_1.weight") == set()
    assert parts.of("model.language_model.layers.0.mlp.up_proj.weight") == {"language", "experts"}
    swapped = find_parts(model, {"projector": [r"re:(model\.)?vision_tower"]})
    assert (swapped.of("model.vision_tower.x"), "vision" in swapped.names) == ({"projector"}, False)
    assert find_parts(model).overridden({"vision": ["no.such.name"]}).prefixes == find_parts(model).prefixes
    with pytest.raises(RequestError, match="parts: 'eyes' is none; parts: language, vision"):
        find_parts(model, {"eyes": ["x"]})


def test_names_under_an_adapter() -> None:
    bundle = bundle_of("llava")
    assert bundle.parts is not None
    assert bundle.parts.of("base_model.model.model.vision_tower.x.q_proj.lora_A.default.weight") == {"vision"}
    assert bundle.parts.of("base_model.model.lm_head.modules_to_save.default.weight") == {"language", "head"}
