"""For plugin authors: pytest fixtures of a tiny random Llama with a byte-level tokenizer and a ChatML template, and how a
family's template file is rendered.

Nothing is downloaded; torch is imported when a fixture is used, not when pytest starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

CHATML = (
    "{%- for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]


def render_file(package: str, file: str, messages: Sequence[dict[str, Any]] = TALK, **kwargs: Any) -> str:
    """What a package's Jinja file writes, as the tokenizers of the transformers library render: blocks trimmed. The package is
    not imported."""
    from jinja2 import Environment

    def refuse(reason: str) -> None:
        raise ValueError(reason)

    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    text = (Path(spec.origin).parent / file).read_text(encoding="utf-8")
    template = Environment(trim_blocks=True, lstrip_blocks=True).from_string(text)
    given = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True, "raise_exception": refuse}
    return template.render(messages=messages, **(given | kwargs))


def make_tokenizer() -> Any:
    """A byte-level tokenizer: one token a byte, and three special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    fast.chat_template = CHATML
    return fast


def save_tiny(folder: Path, **overrides: Any) -> Path:
    """Write a random Llama of about 0.1 million parameters, with its tokenizer. The weights are always the same."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    shape: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 1024, "vocab_size": len(tokenizer), "tie_word_embeddings": True,
    }  # fmt: skip
    config = LlamaConfig(**{**shape, **overrides}, pad_token_id=0, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny model. Do not write into it."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def tiny_bundle(tiny_folder: Path) -> Any:
    """A freshly loaded tiny model on the CPU in fp32, with its template."""
    from swift_plugin_transformers.chat import ChatTemplate
    from swift_plugin_transformers.config import ChatTemplateConfig, TransformersConfig
    from swift_plugin_transformers.loading import load_model, load_processor

    processor = load_processor(str(tiny_folder), TransformersConfig())
    bundle = load_model(str(tiny_folder), processor, {}, TransformersConfig())
    bundle.template = ChatTemplate(processor, ChatTemplateConfig())
    return bundle
