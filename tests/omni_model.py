"""A tiny random model that takes text, pictures and sounds in one batch: Gemma 4's architecture and processor."""

from __future__ import annotations

from pathlib import Path

IMAGE, AUDIO = "<|image|>", "<|audio|>"
TEMPLATE = (
    "{%- for message in messages %}{{ '<|turn>' + message.role + '\n' }}"
    "{%- if message.content is string %}{{ message.content }}{%- else %}{%- for part in message.content %}"
    "{{ '<|image|>' if part.type == 'image' else '<|audio|>' if part.type == 'audio' else part.text }}"
    "{%- endfor %}{%- endif %}{{ '<turn|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|turn>assistant\n' }}{%- endif %}"
)
NAMES = {
    "image_token": IMAGE, "audio_token": AUDIO, "boi_token": "<|image>", "eoi_token": "<image|>", "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
}  # fmt: skip


def save_omni(folder: Path) -> Path:
    """Write the folder: about 0.1 million weights, the same each time."""
    import torch
    from swift_plugin_transformers.processors import without_videos
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration, Gemma4Processor, PreTrainedTokenizerFast
    from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    class NoVideoGemma(Gemma4Processor):  # type: ignore[misc]
        """Without torchvision the library has no class to check what stands for its video processor."""

        def check_argument_for_proper_class(self, argument_name, argument):  # type: ignore[no-untyped-def]
            return type(argument)

    special = ["<pad>", "<|turn>", "<turn|>", *NAMES.values(), "<|video|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate([*special, *alphabet])}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(special)
    words = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<turn|>", extra_special_tokens=NAMES, chat_template=TEMPLATE
    )
    pictures = Gemma4ImageProcessorPil(patch_size=4, max_soft_tokens=70, pooling_kernel_size=3)
    sounds = Gemma4AudioFeatureExtractor(feature_size=16)
    processor = NoVideoGemma(sounds, pictures, words, without_videos({}, "Gemma4Processor"), chat_template=TEMPLATE)
    ids = {name: words.convert_tokens_to_ids(token) for name, token in NAMES.items()}
    config = Gemma4Config(
        text_config={
            "vocab_size": len(words), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
            "num_attention_heads": 4, "num_key_value_heads": 2, "global_head_dim": 8, "num_global_key_value_heads": 2,
            "vocab_size_per_layer_input": len(words), "hidden_size_per_layer_input": 8, "pad_token_id": 0, "bos_token_id": None,
            "eos_token_id": words.eos_token_id, "max_position_embeddings": 1024,
        },
        vision_config={
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "position_embedding_size": 256,
        },
        audio_config={
            "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "subsampling_conv_channels": (16, 4),
            "output_proj_dims": 32,
        },
        boi_token_id=ids["boi_token"], eoi_token_id=ids["eoi_token"], image_token_id=ids["image_token"],
        boa_token_id=ids["boa_token"], eoa_token_index=ids["eoa_token"], audio_token_id=ids["audio_token"],
        video_token_id=words.convert_tokens_to_ids("<|video|>"),
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Gemma4ForConditionalGeneration(config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
