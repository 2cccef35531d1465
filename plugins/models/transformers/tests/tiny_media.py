"""Tiny random multimodal models of several families, as the transformers library makes them."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 99, "pad_token_id": 0,
}  # fmt: skip
CLIP: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip


def llava() -> Any:
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(text_config=tf.LlamaConfig(**TEXT), vision_config=tf.CLIPVisionConfig(**CLIP), image_token_index=98)
    )


def qwen2_vl() -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
    tokens = {"image_token_id": 98, "video_token_id": 97, "vision_start_token_id": 96, "vision_end_token_id": 95}
    config = tf.Qwen2VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, **tokens)
    return tf.Qwen2VLForConditionalGeneration(config)


def idefics3() -> Any:
    return tf.Idefics3ForConditionalGeneration(
        tf.Idefics3Config(text_config=tf.LlamaConfig(**TEXT), vision_config=CLIP, image_token_id=98, scale_factor=2)
    )


def smolvlm() -> Any:
    return tf.SmolVLMForConditionalGeneration(
        tf.SmolVLMConfig(text_config=tf.LlamaConfig(**TEXT), vision_config=CLIP, image_token_id=98, scale_factor=2)
    )


def qwen2_audio() -> Any:
    sound = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "num_mel_bins": 16}
    config = tf.Qwen2AudioConfig(text_config={"model_type": "qwen2", **TEXT}, audio_config=sound, audio_token_index=98)
    return tf.Qwen2AudioForConditionalGeneration(config)


def paligemma() -> Any:
    vision = {"model_type": "siglip_vision_model", "projection_dim": 32, **CLIP}
    text = {"model_type": "gemma", "head_dim": 8, **TEXT}
    return tf.PaliGemmaForConditionalGeneration(
        tf.PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=32, image_token_index=98)
    )


def gemma3() -> Any:
    config = tf.Gemma3Config(
        text_config={"head_dim": 8, **TEXT}, vision_config=CLIP, image_token_index=98, mm_tokens_per_image=4
    )
    return tf.Gemma3ForConditionalGeneration(config)


def qwen3_moe() -> Any:
    return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**TEXT, head_dim=8, num_experts=4, moe_intermediate_size=16))


def make(name: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return globals()[name]()
