"""The template `llama`: what it writes, what it trains, and what it refuses."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from jinja2 import Environment
from swift_core.testing import TemplateContract

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]


class TestTemplate(TemplateContract):
    distribution, id = "swift-plugin-llama", "llama"


def render(messages: list[dict[str, str]] = TALK, **kwargs: Any) -> str:
    """As the tokenizers of the transformers library render: blocks trimmed."""

    def refuse(reason: str) -> None:
        raise ValueError(reason)

    spec = find_spec("swift_plugin_llama")
    assert spec
    assert spec.origin
    text = (Path(spec.origin).parent / "llama.jinja").read_text(encoding="utf-8")
    template = Environment(trim_blocks=True, lstrip_blocks=True).from_string(text)
    given = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True, "raise_exception": refuse}
    return template.render(messages=messages, **(given | kwargs))


def test_writes_what_the_tokenizers_generation_knows() -> None:
    third = "".join(f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n{m['content']}<|eot_id|>" for m in TALK)
    begin, last = "<|begin_of_text|>", "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert render(bos_token=begin) == begin + third + last
    yi = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in TALK)
    assert render(bos_token="<|startoftext|>") == yi + "<|im_start|>assistant\n"
    first = "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello </s>"
    assert render() == first + "<s>[INST] Bye [/INST]"
    assert render(TALK[1:]) == "<s>[INST] Hi [/INST] Hello </s><s>[INST] Bye [/INST]"


def test_refuses_what_it_has_no_place_for() -> None:
    with pytest.raises(ValueError, match="no place for tools"):
        render(tools=[{"type": "function"}])
    with pytest.raises(ValueError, match="no place for the role tool"):
        render([*TALK, {"role": "tool", "content": "7"}])
