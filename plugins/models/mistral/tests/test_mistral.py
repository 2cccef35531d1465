"""The template `mistral`: what it writes, what it trains, and what it refuses."""

from __future__ import annotations

from functools import partial

import pytest
from swift_core.testing import TemplateContract
from swift_plugin_transformers.testing import TALK, render_file


class TestTemplate(TemplateContract):
    distribution, id = "swift-plugin-mistral", "mistral"


render = partial(render_file, "swift_plugin_mistral", "mistral.jinja")


def test_writes_instructions_with_the_system_message_in_the_first() -> None:
    assert render() == "<s>[INST] Be brief.\n\nHi [/INST] Hello</s>[INST] Bye [/INST]"
    assert render(TALK[1:]) == "<s>[INST] Hi [/INST] Hello</s>[INST] Bye [/INST]"


def test_refuses_what_it_has_no_place_for() -> None:
    with pytest.raises(ValueError, match="no place for tools"):
        render(tools=[{"type": "function"}])
    with pytest.raises(ValueError, match="no place for the role tool"):
        render([*TALK, {"role": "tool", "content": "7"}])
