"""Any architecture and task: which class loads a folder, what of it may be new, and the processor that comes with it."""

from __future__ import annotations

import importlib.util
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from swift_core.errors import RequestError
from swift_plugin_transformers.config import TransformersConfig
from swift_plugin_transformers.loading import load_model, load_processor
from swift_plugin_transformers.testing import make_tokenizer, save_tiny

_spec = importlib.util.spec_from_file_location("tiny_media", Path(__file__).parent / "tiny_media.py")
assert _spec is not None
assert _spec.loader is not None
tiny_media = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny_media)


def load(folder: Path, **options: Any) -> Any:
    config = TransformersConfig(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_model(str(folder), load_processor(str(folder), config), {}, config)


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("options", "name", "task"),
    [
        ({}, "LlamaForCausalLM", "causal_lm"),
        ({"task": "causal_lm"}, "LlamaForCausalLM", "causal_lm"),
        ({"task": "sequence_classification", "num_labels": 3}, "LlamaForSequenceClassification", "sequence_classification"),
        ({"task": "token_classification", "labels": ["a", "b"]}, "LlamaForTokenClassification", "token_classification"),
        ({"task": "embedding"}, "LlamaModel", "embedding"),
        ({"task": "reranker"}, "LlamaForSequenceClassification", "reranker"),
        ({"task": "reward"}, "LlamaForSequenceClassification", "reward"),
    ],
)
def test_a_task_chooses_the_class(options: dict[str, Any], name: str, task: str, tiny_folder: Path, tmp_path: Path) -> None:
    bundle = load(tiny_folder, **options)
    assert (type(bundle.model).__name__, bundle.task, bundle.architecture) == (name, task, "LlamaForCausalLM")
    bundle.model.save_pretrained(tmp_path / "saved")
    bundle.processor.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")  # from the folder alone
    assert type(again.model).__name__ == name
    assert again.task == ("sequence_classification" if task in ("reranker", "reward") else task)
    ids = torch.tensor([[9, 8, 7, 6]])
    with torch.no_grad():
        assert torch.equal(bundle.model(ids)[0], again.model(ids)[0])


def test_labels_name_the_classes(tiny_folder: Path) -> None:
    config = load(tiny_folder, task="sequence_classification", labels=["no", "yes"], problem="multi_label").model.config
    assert (config.num_labels, config.id2label, config.problem_type) == (2, {0: "no", 1: "yes"}, "multi_label_classification")
    with pytest.raises(RequestError, match=r"model.num_labels is 3, and model.labels has 2 names"):
        load(tiny_folder, task="sequence_classification", labels=["no", "yes"], num_labels=3)


def test_a_trained_head_is_loaded_and_no_other_weight_may_lack(tiny_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    bundle = load(tiny_folder, task="sequence_classification", num_labels=3)
    folder = save(bundle.model, tmp_path / "head")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_model(str(folder), None, {}, TransformersConfig())
    assert torch.equal(loaded.model.score.weight, bundle.model.score.weight)
    with pytest.raises(RequestError, match=r"score.weight has shape \(3, 64\), and config.json asks for \(4, 64\)$"):
        load(folder, task="sequence_classification", num_labels=4)
    state = load_file(folder / "model.safetensors")
    state.pop("model.norm.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RequestError, match=r"lacks 1 weights, model.norm.weight first"):
        load(folder)


def test_an_encoder_decoder_is_loaded(tmp_path: Path) -> None:
    config = transformers.T5Config(d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, vocab_size=262)
    bundle = load(save(transformers.T5ForConditionalGeneration(config), tmp_path / "t5"))
    assert (type(bundle.model).__name__, bundle.task) == ("T5ForConditionalGeneration", "seq2seq_lm")


def test_a_model_without_a_name_of_its_own_is_told_by_its_type(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "nameless"))
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    assert type(load(folder).model).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("name", "made"),
    [("llava", True), ("qwen2_vl", True), ("idefics3", True), ("gemma3", False), ("qwen2_audio", True), ("smolvlm", True)],
)
def test_multimodal_models_and_their_heads(name: str, made: bool, tmp_path: Path) -> None:
    """Where the library has no classifier of a family, one is made of its parts; it saves and loads like any other."""
    model = tiny_media.make(name).eval()
    folder = save(model, tmp_path / name)
    bundle, ids = load(folder), torch.tensor([[5, 6, 7, 8]])
    assert (type(bundle.model), bundle.task) == (type(model), "causal_lm")
    with torch.no_grad():
        assert float((bundle.model(input_ids=ids).logits - model(input_ids=ids).logits).abs().max()) < 1e-5
    head = load(folder, task="sequence_classification", num_labels=3)
    assert type(head.model).__module__.startswith("swift_plugin_transformers") is made
    again = load(save(head.model, tmp_path / "head"))
    assert again.task == "sequence_classification"
    with torch.no_grad():
        expected = head.model(input_ids=ids).logits
        assert expected.shape == (1, 3)
        assert torch.equal(again.model(input_ids=ids).logits, expected)
        states = load(folder, task="embedding").model(input_ids=ids).last_hidden_state
        whole = bundle.model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    assert float((states - whole).abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "smolvlm"])
def test_documents_laid_end_to_end_see_each_other_in_no_multimodal_model(name: str, tmp_path: Path) -> None:
    bundle = load(save(tiny_media.make(name), tmp_path / name))
    one, two = torch.tensor([[5, 6, 7]]), torch.tensor([[9, 8, 7, 6]])
    both, places = torch.cat([one, two], 1), torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    if name == "qwen2_vl":
        places = places.expand(3, 1, 7)
    with torch.no_grad():
        packed = bundle.model(
            input_ids=both, position_ids=places, cu_seq_lens_q=torch.tensor([0, 3, 7], dtype=torch.int32), use_cache=False
        ).logits
        alone = torch.cat([bundle.model(input_ids=ids).logits for ids in (one, two)], 1)
    assert float((packed - alone).abs().max()) < 1e-5


def save_qwen2_vl(folder: Path) -> Path:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|image_pad|>", "<|video_pad|>"]})
    tiny_media.make("qwen2_vl").save_pretrained(folder)
    processor = transformers.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=4096)
    processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_pictures_need_no_torchvision_and_videos_say_so(tmp_path: Path) -> None:
    folder = save_qwen2_vl(tmp_path / "vl")
    (folder / "video_preprocessor_config.json").write_text('{"min_frames": 3, "merge_size": 2}')
    processor = load_processor(str(folder), TransformersConfig())
    assert type(processor).__name__ == "Qwen2VLProcessor"
    made = processor(images=[Image.new("RGB", (24, 16))], text="see <|image_pad|>", return_tensors="pt")
    assert made["image_grid_thw"].tolist() == [[1, 4, 6]]
    token = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert int((made["input_ids"] == token).sum()) == 6
    if transformers.utils.is_torchvision_available():
        return
    with pytest.raises(RequestError, match=r"a video needs torchvision. Get it: pip install torchvision$"):
        processor(videos=[[Image.new("RGB", (24, 16))] * 2], text="<|video_pad|>", return_tensors="pt")
    processor.save_pretrained(folder)  # and what the folder says of videos is not lost
    assert json.loads((folder / "processor_config.json").read_text())["video_processor"]["min_frames"] == 3
    again = load_processor(str(folder), TransformersConfig())
    assert again.video_processor.min_frames == 3


def test_a_multimodal_folder_without_a_processor_has_its_tokenizer(tmp_path: Path) -> None:
    folder = save(tiny_media.make("llava"), tmp_path / "bare")
    assert not hasattr(load_processor(str(folder), TransformersConfig()), "tokenizer")


def test_code_of_its_own_is_asked_for(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "own")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "strange", "auto_map": {"AutoConfig": "s.C"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        RequestError, match=r"needs Python code of its own, .*: read it, and let it run with --trust-remote-code$"
    ):
        load_model(str(folder), None, {}, TransformersConfig())
