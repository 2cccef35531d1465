"""Tiny random multimodal models of four kinds, with their own processor classes, made locally in a fraction of a second."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from swift_plugin_transformers.processors import without_videos
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

PARTS = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.content is string %}{{ message.content }}{%- else %}"
    "{%- for part in message.content %}"
    "{%- if part.type == 'image' %}{{ IMAGE }}{%- elif part.type == 'audio' %}{{ AUDIO }}{%- elif part.type == 'video' %}"
    "{{ VIDEO }}{%- else %}{{ part.text }}{%- endif %}{%- endfor %}{%- endif %}{{ '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
LLAVA = (  # all images of a message first; a content that is a plain text is dropped in silence
    "{% for message in messages %}{{ message.role.upper() + ': ' }}"
    "{% for part in message.content | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message.content | selectattr('type', 'equalto', 'text') %}{{ part.text }}{% endfor %}"
    "{% if message.role == 'assistant' %}{{ '</s>' }}{% else %}{{ ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


class Tiny(NamedTuple):
    """A model with its processor. `kind` is what it takes."""

    model: Any
    processor: Any
    kind: str
    padded: str | None  # why its samples cannot be laid end to end


def tokenizer(special: list[str], template: str, bos: str | None = None) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<|im_start|>", "<|im_end|>", *([bos] if bos else []), *special]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*names, *alphabet])}
    newline = "Ċ"
    merges = [(newline, newline), (newline + newline, newline)]  # two and three line ends are one token, as in real ones
    for first, second in merges:
        vocabulary[first + second] = len(vocabulary)
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(names)
    if bos:
        made.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<|im_end|>", bos_token=bos)
    fast.chat_template = template
    return fast


def text_shape(vocabulary: int, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 2048, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2,
        **more,
    }  # fmt: skip


def vision_shape(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 4, **more,
    }  # fmt: skip


def llava() -> Tiny:
    words = tokenizer(["<image>", "</s>"], LLAVA, bos="<s>")
    words.eos_token = "</s>"
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        pictures, words, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=LLAVA,
    )  # fmt: skip
    config = LlavaConfig(
        text_config={"model_type": "llama", **text_shape(len(words))},
        vision_config={"model_type": "clip_vision_model", "projection_dim": 16, **vision_shape()},
        image_token_index=processor.image_token_id, vision_feature_layer=-1,
    )  # fmt: skip
    return Tiny(_seeded(LlavaForConditionalGeneration, config), processor, "image", None)


class NoVideoQwen(Qwen2_5_VLProcessor):  # type: ignore[misc]
    """Without torchvision the library has no video processor, nor a class to check what stands for it."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return type(argument)


def qwen() -> Tiny:
    image, video = "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"
    template = PARTS.replace("IMAGE", repr(image)).replace("VIDEO", repr(video)).replace("AUDIO", "''")
    words = tokenizer(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"], template)
    pictures = Qwen2VLImageProcessorPil(min_pixels=64, max_pixels=4096, patch_size=4, temporal_patch_size=2, merge_size=2)
    processor = NoVideoQwen(pictures, words, without_videos({}, "Qwen2_5_VLProcessor"), chat_template=template)
    ids = dict(zip(("vision_start", "vision_end", "image", "video"), words.convert_tokens_to_ids(
        ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]), strict=True))  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = Qwen2_5_VLConfig(
        text_config=text_shape(len(words), rope_parameters=rope),
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1], "in_channels": 3,
        },
        image_token_id=ids["image"], video_token_id=ids["video"], vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
    )  # fmt: skip
    return Tiny(
        _seeded(Qwen2_5_VLForConditionalGeneration, config), processor, "image", "counts positions of media its own way"
    )


def idefics() -> Tiny:
    template = PARTS.replace("IMAGE", "'<image>'").replace("VIDEO", "''").replace("AUDIO", "''")
    grid = [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]
    words = tokenizer(["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *grid], template)
    pictures = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    processor = Idefics3Processor(pictures, words, image_seq_len=4, chat_template=template)
    config = Idefics3Config(
        text_config={"model_type": "llama", **text_shape(len(words))}, vision_config=vision_shape(),
        image_token_id=processor.image_token_id, scale_factor=2, pad_token_id=0,
    )  # fmt: skip
    return Tiny(_seeded(Idefics3ForConditionalGeneration, config), processor, "image", None)


def gemma() -> Tiny:
    template = PARTS.replace("IMAGE", "'<start_of_image>'").replace("VIDEO", "''").replace("AUDIO", "''")
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    words = tokenizer([*names.values()], template)
    for key, value in names.items():
        setattr(words, key, value)
        setattr(words, f"{key}_id", words.convert_tokens_to_ids(value))
    pictures = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    processor = Gemma3Processor(pictures, words, image_seq_length=4, chat_template=template)
    config = Gemma3Config(
        text_config=text_shape(len(words), head_dim=8, sliding_window=4096), vision_config=vision_shape(),
        mm_tokens_per_image=4, boi_token_index=words.boi_token_id, eoi_token_index=words.eoi_token_id,
        image_token_index=words.image_token_id,
    )  # fmt: skip
    model = _seeded(Gemma3ForConditionalGeneration, config)
    torch.nn.init.normal_(  # the library makes it zeros
        model.model.multi_modal_projector.mm_input_projection_weight, std=0.2, generator=torch.Generator().manual_seed(0)
    )
    return Tiny(model, processor, "image", "otherwise when they are laid end to end")  # its pictures see themselves both ways


def audio() -> Tiny:
    template = PARTS.replace("IMAGE", "''").replace("VIDEO", "''").replace("AUDIO", "'<|audio_bos|><|AUDIO|><|audio_eos|>'")
    words = tokenizer(["<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"], template)
    sounds = WhisperFeatureExtractor(feature_size=8, chunk_length=1, sampling_rate=16000)
    processor = Qwen2AudioProcessor(sounds, words, chat_template=template)
    config = Qwen2AudioConfig(
        text_config={"model_type": "qwen2", **text_shape(len(words))},
        audio_config={
            "num_mel_bins": 8, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "d_model": 16,
            "max_source_positions": 50,
        },
        audio_token_index=processor.audio_token_id,
    )  # fmt: skip
    return Tiny(_seeded(Qwen2AudioForConditionalGeneration, config), processor, "audio", None)


def paligemma() -> Tiny:
    """Not one of `MODELS`: its processor moves the first token and adds a line end, so no prefix of a talk is that of a row."""
    template = PARTS.replace("IMAGE", "'<image>'").replace("VIDEO", "''").replace("AUDIO", "''")
    words = tokenizer(["<image>"], template, bos="<bos>")
    pictures = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    pictures.image_seq_length = 16
    processor = PaliGemmaProcessor(pictures, words, chat_template=template)
    config = PaliGemmaConfig(
        text_config={"model_type": "gemma", "head_dim": 8, **text_shape(len(words))},
        vision_config={"model_type": "siglip_vision_model", **vision_shape()},
        image_token_index=processor.image_token_id, projection_dim=32,
    )  # fmt: skip
    return Tiny(_seeded(PaliGemmaForConditionalGeneration, config), processor, "image", None)


MODELS = {"llava": llava, "qwen": qwen, "idefics": idefics, "gemma": gemma, "audio": audio}


def _seeded(kind: Any, config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(config).eval()


def picture(seed: int, size: tuple[int, int] = (40, 24)) -> Any:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size)


def sound(seed: int, seconds: float = 0.4, rate: int = 16000) -> dict[str, Any]:
    noise = np.random.default_rng(seed).normal(0, 0.1, int(seconds * rate)).astype(np.float32)
    return {"array": noise, "sampling_rate": rate}
