"""The template `mistral`: what it writes, what it trains, and what it refuses."""

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
    distribution, id = "swift-plugin-mistral", "mistral"


def render(messages: list[dict[str, str]] = TALK, **kwargs: Any) -> str:
    """As the tokenizers of the transformers library render: blocks trimmed."""

    def refuse(reason: str) -> None:
        raise ValueError(reason)

    spec = find_spec("swift_plugin_mistral")
    assert spec
    assert spec.origin
    text = (Path(spec.origin).parent / "mistral.jinja").read_text(encoding="utf-8")
    template = Environment(trim_blocks=True, lstrip_blocks=True).from_string(text)
    given = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True, "raise_exception": refuse}
    return template.render(messages=messages, **(given | kwargs))


def test_writes_instructions_with_the_system_message_in_the_first() -> None:
    assert render() == "<s>[INST] Be brief.\n\nHi [/INST] Hello</s>[INST] Bye [/INST]"
    assert render(TALK[1:]) == "<s>[INST] Hi [/INST] Hello</s>[INST] Bye [/INST]"


def test_refuses_what_it_has_no_place_for() -> None:
    with pytest.raises(ValueError, match="no place for tools"):
        render(tools=[{"type": "function"}])
    with pytest.raises(ValueError, match="no place for the role tool"):
        render([*TALK, {"role": "tool", "content": "7"}])
