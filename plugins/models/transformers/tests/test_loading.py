"""The loader: what a complete folder gives, and one clear line for each way in which a folder can be wrong."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from swift_core.errors import RequestError
from swift_core.testing import ModelContract
from swift_plugin_transformers.config import TransformersConfig
from swift_plugin_transformers.loading import cast_media, load_model, load_processor
from swift_plugin_transformers.testing import save_tiny
from transformers import AutoModelForCausalLM

IDS = torch.tensor([[10, 20, 30, 40, 50, 60]])


class TestTransformersLoader(ModelContract):
    distribution, id = "swift-plugin-transformers", "transformers"


def load(folder: Path, allow_pickle: bool = False, **kwargs: Any) -> Any:
    config = TransformersConfig()
    config.allow_pickle = allow_pickle
    return load_model(str(folder), None, kwargs, config)


def refused(folder: Path, message: str, **options: Any) -> None:
    """Loading raises one line that matches, and names the folder."""
    with pytest.raises(RequestError, match=message) as caught:
        load(folder, **options)
    assert "\n" not in str(caught.value)
    assert folder.name in str(caught.value)


@pytest.fixture
def copied(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "copied"))


def test_weights_are_those_of_transformers(tiny_folder: Path) -> None:
    bundle = load(tiny_folder)
    reference = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    assert bundle.architecture == "LlamaForCausalLM"
    assert bundle.quantization is None
    assert not bundle.model.training
    with torch.no_grad():
        assert torch.equal(bundle.model(IDS).logits, reference(IDS).logits)


def test_dtype_attention_and_skeleton(tiny_folder: Path) -> None:
    assert {p.dtype for p in load(tiny_folder, dtype=torch.bfloat16).model.parameters()} == {torch.bfloat16}
    eager = load_model(str(tiny_folder), None, {}, TransformersConfig(attention="eager"))
    assert eager.model.config._attn_implementation == "eager"
    bare = load(tiny_folder, skeleton=True, dtype=torch.bfloat16).model
    full = load(tiny_folder).model
    assert {p.device.type for p in bare.parameters()} == {"meta"}
    assert {n: p.shape for n, p in bare.named_parameters()} == {n: p.shape for n, p in full.named_parameters()}
    assert {p.dtype for p in bare.parameters()} == {torch.bfloat16}
    assert not bare.training


def test_truncated_safetensors(copied: Path) -> None:
    file = copied / "model.safetensors"
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for size in (len(whole) - 1, header + 10, header - 10, 4):
        file.write_bytes(whole[:size])
        refused(copied, rf"model.safetensors is truncated: it has {size} bytes, its header needs \d+. Copy it again")
    file.write_bytes(whole[:8] + b"x" * (len(whole) - 8))
    refused(copied, "model.safetensors is damaged: its header is not JSON")


def test_missing_shard(copied: Path, tiny_folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_folder).save_pretrained(copied, max_shard_size="100KB")
    (copied / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(copied.glob("model-*.safetensors"))
    assert len(shards) > 2
    with torch.no_grad():
        assert torch.equal(load(copied).model(IDS).logits, load(tiny_folder).model(IDS).logits)
    shards[1].unlink()
    refused(copied, rf"lacks 1 of {len(shards)} weight files, {shards[1].name} first$")
    (copied / "model.safetensors.index.json").write_text('{"weight_map"')
    refused(copied, "model.safetensors.index.json cannot be read")


def test_missing_tensor_is_never_made_up(copied: Path) -> None:
    file = copied / "model.safetensors"
    tensors = load_file(file)
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        tensors.pop(name)
        save_file(tensors, file, metadata={"format": "pt"})
    refused(copied, r"lacks 2 weights, model.layers.1.mlp.up_proj.weight first: is the folder complete\?$")


def test_bin_only_needs_leave(copied: Path, tiny_folder: Path) -> None:
    torch.save(load_file(copied / "model.safetensors"), copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    refused(copied, r"holds \.bin weights only; allow_pickle=true reads them with weights_only=True$")
    with torch.no_grad():
        same = load(copied, allow_pickle=True).model(IDS).logits
        assert torch.equal(same, load(tiny_folder).model(IDS).logits)


def test_a_pickle_with_code_in_it_is_refused_even_with_leave(copied: Path, tmp_path: Path) -> None:
    """weights_only=True: nothing that the pickle asks for is run."""
    (copied / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Harm(tmp_path / "harm")}, copied / "pytorch_model.bin")
    refused(copied, "cannot be loaded", allow_pickle=True)
    assert not (tmp_path / "harm").exists()


class Harm:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_no_weights(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    refused(copied, r"holds no weights: no \.safetensors file$")


def test_no_config(copied: Path) -> None:
    (copied / "config.json").unlink()
    refused(copied, "its config.json cannot be used: ")


@pytest.mark.parametrize("change", [{"model_type": "no-such-type"}, {"model_type": None}])
def test_unknown_model_type(copied: Path, change: dict[str, Any]) -> None:
    config = json.loads((copied / "config.json").read_text()) | change
    (copied / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    refused(copied, "its config.json cannot be used: ValueError: .*model")


def test_config_that_is_not_json(copied: Path) -> None:
    (copied / "config.json").write_text("{")
    refused(copied, "its config.json cannot be used: ")


def test_weights_of_another_shape(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text()) | {"intermediate_size": 96}
    (copied / "config.json").write_text(json.dumps(config))
    layer = "model.layers.0.mlp.down_proj.weight"
    refused(copied, rf"{layer} has shape \(64, 128\), and config.json asks for \(64, 96\)$")


def test_weights_without_a_place_are_told(copied: Path) -> None:
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    config = json.loads((copied / "config.json").read_text()) | {"num_hidden_layers": 1}
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="9 of its weights have no place in the model, model.layers.1.input_layernorm.weight"):
        load(copied)
    logging.getLogger("transformers").removeHandler(handler)
    assert told == []  # transformers' own report of many lines is not printed as well


def test_a_folder_that_needs_code_of_its_own(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "strange.Config", "AutoModelForCausalLM": "strange.Model"}}
    (copied / "config.json").write_text(json.dumps(config))
    (copied / "strange.py").write_text(f"open({str(copied / 'ran')!r}, 'w')\n")
    refused(copied, "needs Python code of its own, .* with --trust-remote-code$")
    assert not (copied / "ran").exists()


def test_tokenizer_that_is_missing_or_damaged(copied: Path) -> None:
    file = copied / "tokenizer.json"
    for damage, reason in (("{", "JSONDecodeError"), (None, "the folder holds no tokenizer.json$")):
        file.unlink() if damage is None else file.write_text(damage)
        with pytest.raises(
            RequestError, match=rf"{re.escape(str(copied))}: its tokenizer cannot be loaded: {reason}"
        ) as caught:
            load_processor(str(copied), TransformersConfig())
        assert "\n" not in str(caught.value)


def test_a_name_that_may_be_a_folder_or_a_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RequestError, match=r"^model models/nope: .*: there is no such folder, and as a hub id: "):
        load_processor("models/nope", TransformersConfig())


def test_an_untied_head_is_loaded_as_it_is(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "untied", tie_word_embeddings=False)
    model = load(folder).model
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, load_file(folder / "model.safetensors")["lm_head.weight"])


def test_media_in_a_half_precision_come_in_that_of_the_model() -> None:
    class Seen(torch.nn.Module):
        dtype = torch.float64

        def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
            return inputs

    model = Seen()
    cast_media(model)
    given = {"pixels": torch.tensor([0.25], dtype=torch.bfloat16), "sizes": torch.tensor([3]), "sound": torch.tensor([0.5])}
    seen = model(**given)
    assert {name: tensor.dtype for name, tensor in seen.items()} == {
        "pixels": torch.float64, "sizes": torch.int64, "sound": torch.float32,
    }  # fmt: skip
    assert seen["pixels"].tolist() == [0.25]
