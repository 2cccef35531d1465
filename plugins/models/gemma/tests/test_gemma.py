"""The template `gemma`: what it writes, what it trains, and what it refuses."""

from __future__ import annotations

from functools import partial

import pytest
from swift_core.testing import TemplateContract
from swift_plugin_transformers.testing import TALK, render_file


class TestTemplate(TemplateContract):
    distribution, id = "swift-plugin-gemma", "gemma"


render = partial(render_file, "swift_plugin_gemma", "gemma.jinja")


def test_writes_turns_with_the_system_message_in_the_first() -> None:
    rest = "<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n<start_of_turn>user\nBye<end_of_turn>\n"
    assert render(bos_token="<bos>") == f"<bos><start_of_turn>user\nBe brief.\n\nHi{rest}<start_of_turn>model\n"
    assert render(TALK[1:], bos_token="<bos>", add_generation_prompt=False) == f"<bos><start_of_turn>user\nHi{rest}"


def test_refuses_what_it_has_no_place_for() -> None:
    with pytest.raises(ValueError, match="no place for tools"):
        render(tools=[{"type": "function"}])
    with pytest.raises(ValueError, match="no place for the role tool"):
        render([*TALK, {"role": "tool", "content": "7"}])
