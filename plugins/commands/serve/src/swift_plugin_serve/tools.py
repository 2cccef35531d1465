"""Tools, and what `tool_choice` makes of them: which the model is told of, and whether a grammar makes it call one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from swift_core.types import Constraint

from swift_plugin_serve.errors import ApiError
from swift_plugin_serve.schemas import Allowed, NamedTool, ToolChoice
from swift_plugin_serve.served import Served


@dataclass(frozen=True)
class Offer:
    """tools: what the chat template renders; None for none. demanded: the answer must be a call, of `name` where that is set.
    single: at most one call is wanted."""

    tools: list[Any] | None = None
    demanded: bool = False
    name: str | None = None
    single: bool = False

    def constraint(self, template: Any, prompt: Sequence[int]) -> Constraint | None:
        """The grammar of a call in answer to a prompt's ids, where one is demanded."""
        if not self.demanded:
            return None
        return Constraint("grammar", template.call_grammar(self.tools, self.name, not self.single, prompt))


def offer(
    served: Served, tools: Sequence[Any] | None, choice: ToolChoice | None, parallel: bool | None, form: Constraint | None
) -> Offer:
    """tools: as the client sent them. form: what the answer must be anyway. Raises ApiError."""
    names = [tool["function"]["name"] for tool in tools or ()]
    if len(set(names)) < len(names):
        raise ApiError(400, "tools: two have the same name", param="tools")
    if not tools:
        if choice is not None and choice not in ("none", "auto"):
            raise ApiError(400, "tool_choice needs 'tools'", param="tool_choice")
        return Offer()
    if choice == "none":
        return Offer()
    offered, mode, name = list(tools), choice or "auto", None
    if isinstance(choice, NamedTool):
        mode, name = "required", choice.function.name
        _known(names, name)
    elif isinstance(choice, Allowed):
        mode, allowed = choice.allowed_tools.mode, [tool.function.name for tool in choice.allowed_tools.tools]
        for wanted in allowed:
            _known(names, wanted)
        offered = [tool for tool in offered if tool["function"]["name"] in allowed]
    single = parallel is False or name is not None
    if form is not None:
        raise ApiError(400, "an answer of a given form leaves no room for a tool call: give tool_choice 'none'", param="tools")
    if mode == "auto":
        return Offer(offered, single=single)
    template, why = served.template, "tool_choice 'required' or a name"
    if not hasattr(template, "call_grammar"):
        raise ApiError(400, f"{why}: the chat template of {served.name} has no form of a tool call", param="tool_choice")
    served.needs("constraint", why)
    return Offer(offered, True, name, single)


def _known(names: Sequence[str], name: str) -> None:
    if name not in names:
        raise ApiError(400, f"tool_choice: no tool {name!r}; tools: {', '.join(names)}", param="tool_choice")
