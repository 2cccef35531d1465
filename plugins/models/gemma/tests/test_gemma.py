"""The template `gemma`: what it writes, what it trains, and what it refuses."""

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
    distribution, id = "swift-plugin-gemma", "gemma"


def render(messages: list[dict[str, str]] = TALK, **kwargs: Any) -> str:
    """As the tokenizers of the transformers library render: blocks trimmed."""

    def refuse(reason: str) -> None:
        raise ValueError(reason)

    spec = find_spec("swift_plugin_gemma")
    assert spec
    assert spec.origin
    text = (Path(spec.origin).parent / "gemma.jinja").read_text(encoding="utf-8")
    template = Environment(trim_blocks=True, lstrip_blocks=True).from_string(text)
    given = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True, "raise_exception": refuse}
    return template.render(messages=messages, **(given | kwargs))


def test_writes_turns_with_the_system_message_in_the_first() -> None:
    rest = "<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n<start_of_turn>user\nBye<end_of_turn>\n"
    assert render(bos_token="<bos>") == f"<bos><start_of_turn>user\nBe brief.\n\nHi{rest}<start_of_turn>model\n"
    assert render(TALK[1:], bos_token="<bos>", add_generation_prompt=False) == f"<bos><start_of_turn>user\nHi{rest}"


def test_refuses_what_it_has_no_place_for() -> None:
    with pytest.raises(ValueError, match="no place for tools"):
        render(tools=[{"type": "function"}])
    with pytest.raises(ValueError, match="no place for the role tool"):
        render([*TALK, {"role": "tool", "content": "7"}])
