"""The template `llama`: what it writes, what it trains, and what it refuses."""

from __future__ import annotations

from functools import partial

import pytest
from swift_core.testing import TemplateContract
from swift_plugin_transformers.testing import TALK, render_file


class TestTemplate(TemplateContract):
    distribution, id = "swift-plugin-llama", "llama"


render = partial(render_file, "swift_plugin_llama", "llama.jinja")


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
