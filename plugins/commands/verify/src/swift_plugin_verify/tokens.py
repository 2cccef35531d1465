"""A tokenizer made here: one token a byte, the special tokens that an architecture names, and a chat template.

What it tokenizes to is the same on every machine and in every version of the library; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

VOCABULARY = 384  # 256 bytes, special tokens, and spare rows of the embedding
BASE = {"pad": "<|pad|>", "unk": "<|unk|>", "bos": "<|bos|>", "eos": "<|im_end|>", "start": "<|im_start|>", "mask": "<|mask|>"}
ALIASES = {"cls": "bos", "sep": "eos", "decoder_start": "bos", "eod": "eos", "eot": "eos", "forced_eos": "eos"}

CHATML = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{ message.content }}"
    "{%- else %}{%- for part in message.content %}"
    "{%- if part.type == 'text' %}{{ part.text }}"
    "{%- elif part.type == 'image' %}{{ '@image@' }}"
    "{%- elif part.type == 'video' %}{{ '@video@' }}"
    "{%- elif part.type == 'audio' %}{{ '@audio@' }}"
    "{%- endif %}{%- endfor %}{%- endif %}{{ '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)


def chat_template(image: str = "", video: str = "", audio: str = "") -> str:
    """A ChatML template that also takes lists of parts; the arguments stand where a part's media goes."""
    return CHATML.replace("@image@", image).replace("@video@", video).replace("@audio@", audio)


def make_tokenizer(special: Iterable[str] = (), **named: str) -> Any:
    """`special`: further special tokens, by their text. `named`: tokens that the tokenizer is to have as an attribute, such
    as image_token="<image>"."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    marks = list(dict.fromkeys([*BASE.values(), *special, *named.values()]))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*marks, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(marks)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=BASE["pad"], eos_token=BASE["eos"], bos_token=BASE["bos"], unk_token=BASE["unk"],
        additional_special_tokens=[mark for mark in marks if mark not in named.values()], extra_special_tokens=named,
    )  # fmt: skip
    fast.chat_template = chat_template()
    fast.model_max_length = 512
    return fast


def token_ids(tokenizer: Any) -> dict[str, int]:
    """Ids by the names that configurations use: pad, bos, eos, and what goes by another name there."""
    found = {name: tokenizer.convert_tokens_to_ids(text) for name, text in BASE.items()}
    return found | {name: found[other] for name, other in ALIASES.items()}
