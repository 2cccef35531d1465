"""Makes the configuration of a tiny model out of an architecture's default one, by rule.

Each field is known by its name: a width, a count of heads, of layers, of experts, a token's id. What a layer is made of is
kept: one layer of each kind that the default has. The few fields that no name tells are in `exceptions.toml`.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

HIDDEN, HEADS, KEY_HEADS, HEAD = 64, 4, 2, 16
LAYERS, MOST_LAYERS = 2, 6

RULES: list[tuple[str, int]] = [
    # Names that match whole, and the tiny value; the first that matches counts, and no value is made larger than it was.
    (r"\w*vocab_size\w*|n_vocab", 0),  # 0: the tokenizer's
    (r"max_(position|target|seq|2d_position)\w*|n_positions|n_ctx|max_length|(left|right)_max_position_embeddings", 512),
    (r"num_kv_shared_layers", 2),
    (r"(vision_|text_|encoder_|decoder_)?(num_hidden_layers|num_layers|n_layers?|layers|depth|num_blocks)", LAYERS),
    (r"num_(encoder|decoder)_(layers|blocks)|\w+_(num_)?(hidden_)?layers", LAYERS),
    (r"linear_num_value_heads|linear_num_heads", 4),
    (r"linear_num_key_heads", 2),
    (r"num_kv_heads|n_head_kv|kv_n_heads|multi_query_group_num|num_key_value_groups|\w*num_key_value_heads", KEY_HEADS),
    (r"mamba_(n_heads|num_heads)|n_mamba_heads", 8),
    (r"mamba_(d_head|head_dim)", 16),
    (r"\w*(num_attention_heads|num_heads|n_heads?|attention_heads)", HEADS),
    (r"q_lora_rank|o_lora_rank|kv_lora_rank", 32),
    (r"qk_nope_head_dim", 16),
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r"qk_head_dim", 24),
    (r"(\w+_)?head_dim|v_head_dim|d_kv|d_head|attention_head_size|kv_channels|head_size|dim_head", HEAD),
    (r"n_routed_experts|num_(local_|routed_)?experts|moe_num_experts|n_experts|zero_expert_num", 4),
    (r"num_experts_per_tok(en)?|moe_(k|top_k|topk)|top_k_experts|num_selected_experts", 2),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"n_group|topk_group|n_groups|mamba_n_groups|mamba_ngroups|num_expert_groups?", 1),
    (r"first_k_dense_replace|moe_layer_start_index|num_dense_layers", 1),
    (r"state_size|mamba_d_state|ssm_state_size|d_state", 8),
    (r"chunk_size|mamba_chunk_size", 16),
    (r"time_step_rank|mamba_dt_rank", 4),
    (r"sliding_window|sliding_window_size|local_attention|attention_window\w*|window_size|attention_chunk_size", 32),
    (r"index_topk", 64),  # the shorter of two samples whole: which of equally scored keys is taken depends on padding
    (
        r"\w*(intermediate_size(_mlp)?|ffn_dim|ffn_hidden_size|d_ff|n_inner|dim_feedforward|intermediate_dim)|feed_forward\w*",
        96,
    ),
    (r"dff|dim_ff|decoder_ffn\w*|encoder_ffn\w*|mlp_dim|mlp_hidden_size", 96),
    (r"hidden_size_per_layer_input|laurel_rank|adapter_rank", 16),
    (r"bottleneck|embedding_size|embedding_dim|word_embed_proj_dim", HIDDEN),
    (
        r"hidden_size_global|\w*(hidden_size|d_model|n_embd|hidden_dim|embed_dim|model_dim|emb_dim|dim_model)|dim|lru_width",
        HIDDEN,
    ),
    (r"mm_tokens_per_image|image_seq_length|num_query_tokens|num_image_tokens", 4),
    (r"projection_dim|output_dim|out_dim", HIDDEN),
    (r"image_size|crop_size", 32),
    (r"patch_size|spatial_patch_size", 8),
]
SPREAD = 0.1  # standard deviation of weights: the logits of a tiny model then differ by whole units
NO_NOISE = re.compile(r"\w*(drop(out|_rate|path|_path|_prob)?\w*|layerdrop|pdrop|jitter\w*)")
TOKEN = re.compile(r"(\w+?)_(token_id|token_index|index|token)")
NOT_TOKENS = re.compile(r"\w*(ignore|layer|loss|active|feature|select|block)\w*index")


@dataclass(frozen=True)
class Shape:
    """What a tiny configuration must fit to: the size of the vocabulary, and ids of named tokens."""

    vocabulary: int
    tokens: Mapping[str, int]  # "pad", "bos", "eos", "image" -> id


@cache
def exceptions() -> dict[str, dict[str, Any]]:
    """Fields by model type, where the rule does not do."""
    return tomllib.loads((Path(__file__).parent / "exceptions.toml").read_text(encoding="utf-8"))


def shrink(cls: type, shape: Shape, given: Mapping[str, Any] | None = None) -> Any:
    """A tiny configuration of a class. `given`: fields that go before the rule; for a part of it, a table of its fields."""
    own = {**exceptions().get(cls.model_type, {}), **(given or {})}  # type: ignore[attr-defined]
    parts = set(getattr(cls, "sub_configs", {}))
    fixed = {name: value for name, value in own.items() if name not in parts}
    nested = {name: own[name] for name in parts & own.keys()}
    ids = {name: shape.tokens[value] for name, value in fixed.items() if isinstance(value, str) and value in shape.tokens}
    fixed |= {name: number for name, number in ids.items() if name.endswith(("_id", "_index"))}  # a token by its name or text
    extra = {name: value for name, value in fixed.items() if name not in {f.name for f in fields(cls)}}
    found = overrides(cls, cls(**extra, **nested), shape, nested)
    return cls(**{**found, **fixed})


def overrides(cls: type, default: Any, shape: Shape, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a class that the rule changes, from its default instance."""
    read = getattr(default, "_getattr_without_heterogeneous_validation", None)
    values = {f.name: read(f.name, None) if read else getattr(default, f.name, None) for f in fields(cls) if f.init}
    count = getattr(default, "num_hidden_layers", None)
    kept = kept_layers(values, count) if isinstance(count, int) else []
    found: dict[str, Any] = {}
    for name, value in values.items():
        if hasattr(value, "sub_configs"):
            found[name] = shrink(type(value), shape, given.get(name))
            continue
        new = change(name, value, shape, kept, count)
        if new is not value:
            found[name] = new
    if kept:
        found["num_hidden_layers"] = len(kept)
    rope = values.get("rope_parameters")
    if isinstance(rope, dict) and "rope_parameters" not in found:
        sections = "mrope_section" in getattr(cls, "ignore_keys_at_rope_validation", ())
        found["rope_parameters"] = tiny_rope(rope, int(found.get("head_dim") or HEAD), sections)
    return found | related(values, found)


def tiny_rope(rope: dict[str, Any], head: int, sections: bool) -> dict[str, Any]:
    """Rotary parameters whose sections for time, height and width fill half of the rotated part of a head."""
    if any(isinstance(value, dict) for value in rope.values()):
        return {key: tiny_rope(value, head, sections) if isinstance(value, dict) else value for key, value in rope.items()}
    if not (sections or "mrope_section" in rope):
        return rope
    half = int(head * rope.get("partial_rotary_factor", 1.0)) // 2
    return {**rope, "mrope_section": [half - 2 * (half // 4), half // 4, half // 4]}


def kept_layers(values: dict[str, Any], count: int) -> list[int]:
    """Indexes of layers that show every kind of layer the default has, in order; empty where nothing tells layers apart."""
    lists = [value for value in values.values() if isinstance(value, list | tuple) and len(value) == count]
    kinds: dict[str, int] = {}
    for number in range(count):
        kinds.setdefault(repr([value[number] for value in lists]), number)
    kept = sorted(kinds.values())[:MOST_LAYERS]
    kept += [number for number in range(count) if number not in kept][: max(0, LAYERS - len(kept))]
    return sorted(kept) if lists else []


def change(name: str, value: Any, shape: Shape, kept: list[int], count: Any) -> Any:
    """The tiny value of a field; `value` itself where the rule leaves it alone."""
    if isinstance(value, bool):
        return True if name == "is_decoder" else value
    if name == "image_grid_pinpoints":
        return [[32, 64], [64, 32], [64, 64]]
    if isinstance(value, list | tuple):
        cut = _list(name, value, kept, count)
        return [change(name, item, shape, [], None) for item in cut] if cut is not value else value
    if name == "head_dim" and value is None:
        return HEAD
    if re.fullmatch(r"initializer_range|init_std|initializer_std", name) and isinstance(value, float):
        return SPREAD
    if NO_NOISE.fullmatch(name) and isinstance(value, int | float):
        return 0.0 if isinstance(value, float) else 0
    token = TOKEN.fullmatch(name)
    if token and not NOT_TOKENS.fullmatch(name):
        if name.startswith("forced"):
            return None
        if token[1] in shape.tokens and value is not None:
            return shape.tokens[token[1]]
        return value if not isinstance(value, int) or value < shape.vocabulary else shape.tokens["unk"]
    if not isinstance(value, int):
        return value
    for pattern, tiny in RULES:
        if re.fullmatch(pattern, name):
            return shape.vocabulary if not tiny else min(value, tiny) if value > 0 else value
    return value


def related(values: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Sizes that go together: those of a head that is the sum of its parts, and the heads of latent attention."""

    def tiny(name: str) -> int:
        return int(found.get(name, values[name]) or 0)

    rope, nope, head = (values.get(name) for name in ("qk_rope_head_dim", "qk_nope_head_dim", "head_dim"))
    if not (rope and nope):
        return {}
    sizes = {"num_key_value_heads": tiny("num_attention_heads")} if "num_key_value_heads" in values else {}
    if head in (rope, rope + nope):
        sizes["head_dim"] = tiny("qk_rope_head_dim") + (tiny("qk_nope_head_dim") if head != rope else 0)
    return sizes


def _list(name: str, value: Any, kept: list[int], count: Any) -> Any:
    """A list with an entry for each layer, cut to the layers kept; a list of layers' numbers, those numbered anew."""
    if kept and len(value) == count:
        return [value[number] for number in kept]
    if re.search(r"layers|ind(ex|ic)es|idxs", name) and value and all(isinstance(item, int) for item in value):
        return [kept.index(item) for item in value if item in kept] if kept else [n for n in value if 0 <= n < LAYERS] or [0]
    return value
