"""Conversations rendered to see how a template writes an answer: a call, two, text beside a call, reasoning.

What a probe says occurs in no template. Renderings go through the same code as training rows, so the forms of arguments and the
ends of turns are those of training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from swift_core.types import Row

from swift_plugin_transformers.rendering import Conversation, Refused, forms, standard
from swift_plugin_transformers.thinking import ANSWER, THOUGHT, USER
from swift_plugin_transformers.turns import find_turn

NAMES = ("zq_look_up", "zq_add")
ARGUMENTS: tuple[dict[str, Any], ...] = (
    {"zqword": "Zq1 tea é", "zqcount": 7351, "zqlist": [7352, 7353]},
    {"zqflag": True, "zqname": "Zq2 cup"},
)
KINDS = {"zqword": "string", "zqcount": "integer", "zqlist": "array", "zqflag": "boolean", "zqname": "string"}
IDS = ("zqcall001", "zqcall002")


def _tool(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, dict[str, Any]] = {key: {"type": KINDS[key], "description": "what"} for key in arguments}
    fields = {
        key: value | ({"items": {"type": "integer"}} if value["type"] == "array" else {}) for key, value in fields.items()
    }
    parameters = {"type": "object", "properties": fields, "required": list(fields)[:1]}
    return {"type": "function", "function": {"name": name, "description": "Does it.", "parameters": parameters}}


TOOLS = [_tool(name, arguments) for name, arguments in zip(NAMES, ARGUMENTS, strict=True)]
CALLS = [
    {"id": ident, "type": "function", "function": {"name": name, "arguments": arguments}}
    for ident, name, arguments in zip(IDS, NAMES, ARGUMENTS, strict=True)
]
QUESTION: Row = {"role": "user", "content": USER}


@dataclass(frozen=True)
class Rendered:
    """One answer in a template's rendering: the prompt, the answer, and what ends the turn, as far as that is known."""

    prompt: str
    before: str  # the text before the answer, where that is not the prompt
    answer: str
    appended: str = ""

    @property
    def whole(self) -> str:
        return self.before + self.answer


def render(template: Any, message: Row, tools: list[Any] | None = None) -> Rendered | None:
    """A probe's answer, or None where the template refuses it."""
    messages = standard([QUESTION, {"role": "assistant", **message}])
    kwargs = template.kwargs_for(messages, tools, dict(template.config.kwargs))
    for form in forms(messages):
        conversation = Conversation(template.renderer, messages, tools, kwargs, form)
        try:
            turn = find_turn(conversation, 1, template.facts(tools, kwargs), template.markers)
        except Refused:
            continue
        prompt, text = conversation.text(1, prompt=True), turn.text[: turn.end]
        return Rendered(prompt, text[: turn.hole], text[turn.hole :], turn.appended or "")
    for form in forms(messages):
        conversation = Conversation(template.renderer, messages, tools, kwargs, form)
        try:
            prompt, text = conversation.text(1, prompt=True), conversation.text(2)
        except Refused:
            continue
        start = template.markers.shared(text, prompt)
        return Rendered(prompt, text[:start], text[start:])
    return None


def with_calls(template: Any, count: int, **more: Any) -> Rendered | None:
    return render(template, {"content": None, "tool_calls": CALLS[:count], **more}, TOOLS)


def plain(template: Any) -> Rendered | None:
    message = {"content": ANSWER}
    return render(template, message) or render(template, message, TOOLS)  # some templates are for talks with tools only


def reasoned(template: Any, calls: bool = False) -> Rendered | None:
    message: Row = {"content": ANSWER, "reasoning_content": THOUGHT}
    if calls:
        message |= {"content": "", "tool_calls": CALLS[:1]}
    return render(template, message, TOOLS if calls else None)


def default_prompt(template: Any) -> str:
    """The generation prompt as inference has it: with the template's own defaults."""
    try:
        return str(template.prompt_text([QUESTION]))
    except ValueError:
        return ""
