"""The template `qwen`: what it writes, what it trains, and what it refuses."""

from __future__ import annotations

from functools import partial

import pytest
from swift_core.testing import TemplateContract
from swift_plugin_transformers.testing import TALK, render_file


class TestTemplate(TemplateContract):
    distribution, id = "swift-plugin-qwen", "qwen"


render = partial(render_file, "swift_plugin_qwen", "qwen.jinja")


def test_writes_chatml_and_no_system_message_of_its_own() -> None:
    turns = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
    assert render(TALK[1:]) == turns + "<|im_start|>assistant\n"
    assert render(add_generation_prompt=False) == "<|im_start|>system\nBe brief.<|im_end|>\n" + turns


def test_refuses_what_it_has_no_place_for() -> None:
    with pytest.raises(ValueError, match="no place for tools"):
        render(tools=[{"type": "function"}])
    with pytest.raises(ValueError, match="no place for the role tool"):
        render([*TALK, {"role": "tool", "content": "7"}])
