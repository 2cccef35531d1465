"""A small vision-language model made on the spot: LLaVA's architecture, random weights, its own tokenizer and processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from strips import CELL, LARGEST, READ, SIDE

TEMPLATE = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{ message.content }}{%- else %}{%- for part in message.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}{%- endfor %}{%- endif %}{{ '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<image>"]


def make_tokenizer() -> Any:
    """Bytes, joined to the words of the two questions; each digit is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    words.train_from_iterator([f"user\n{question}\nassistant\n" for question in (READ, LARGEST)] * 10, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<|pad|>", eos_token="<|im_end|>", extra_special_tokens={"image_token": "<image>"}
    )


def save(folder: Path, width: int = 160) -> int:
    """Write the model's folder; returns its number of weights. The same weights each time."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.utils import logging

    tokenizer = make_tokenizer()
    pictures = CLIPImageProcessorPil(do_resize=False, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor = LlavaProcessor(
        pictures, tokenizer, patch_size=CELL, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE, image_token="<image>",
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2, num_attention_heads=4, image_size=SIDE,
        patch_size=CELL, projection_dim=width,
    )  # fmt: skip
    # random weights of the library's usual spread, 0.02, are meant for wide models; narrow ones learn late from them
    language = LlamaConfig(
        hidden_size=width, intermediate_size=3 * width, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=len(tokenizer), max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.08,
        pad_token_id=0, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=language, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1, image_seq_length=(SIDE // CELL) ** 2, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return sum(weight.numel() for weight in model.parameters())
