"""Renders messages with a chat template, through the tokenizer's own `apply_chat_template`, as inference does.

The template is the checkpoint's, one of its named variants, a file, or a text. Messages go in as the row has them, in one of
a few forms: tool arguments as objects, then as JSON text, and a missing content as it is, then as an empty text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError, TemplateSyntaxError
from swift_core.errors import RequestError
from swift_core.types import Row
from transformers.utils.chat_template_utils import render_jinja_template

from swift_plugin_transformers.config import ChatTemplateConfig

OURS = ("train", "weight")  # keys of a message that are for us, not for the template
KEPT = ("Zq5uz", "Zq6wz")  # texts that no template writes
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
FAULTS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)  # of a template that is run

Form = Callable[[Row], Row]


class Refused(ValueError):
    """The chat template does not render these messages."""


class Renderer:
    """A chat template with its tokenizer. Raises RequestError for a template that is absent or broken."""

    def __init__(self, tokenizer: Any, config: ChatTemplateConfig, processor: Any = None) -> None:
        self.tokenizer = tokenizer
        self.given, self.origin = _given(tokenizer, config, processor)
        for source in [self.given] if self.given else _own(tokenizer).values():
            try:
                tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False, chat_template=source)
            except TemplateSyntaxError as err:
                raise RequestError(f"{self.origin}: line {err.lineno} of the chat template: {err.message}") from None
            except FAULTS:
                pass  # it may refuse this message; only its syntax is tried here
        self.parts_only = processor is not None and not self._keeps_texts()

    def _keeps_texts(self) -> bool:
        """Whether the template writes a content that is a plain text. Some read lists of parts only, and drop it in silence."""
        talk = [{"role": "user", "content": KEPT[0]}, {"role": "assistant", "content": KEPT[1]}]
        try:
            text = self.tokenizer.apply_chat_template(talk, tokenize=False, chat_template=self.given)
        except FAULTS:
            return False
        return all(word in text for word in KEPT)

    def source(self, tools: Any) -> str:
        """The Jinja text in use: a checkpoint with several picks `tool_use` where there are tools."""
        try:
            return str(self.tokenizer.get_chat_template(self.given, tools or None))
        except ValueError as err:
            raise RequestError(f"{' '.join(str(err).split())} Choose one with template.variant.") from None

    def render(self, messages: list[Row], tools: Any, kwargs: dict[str, Any], prompt: bool = False) -> str:
        """The text, ending with the generation prompt where asked. Raises Refused."""
        options = {"tools": tools or None, "tokenize": False, "add_generation_prompt": prompt, "chat_template": self.given}
        messages = self.shaped(messages)
        try:
            return str(self.tokenizer.apply_chat_template(messages, **options, **kwargs))
        except FAULTS as err:
            raise Refused(f"the chat template refuses the row: {' '.join(str(err).split())}") from None

    def shaped(self, messages: list[Row]) -> list[Row]:
        """The messages, with each text as a list of parts where the template reads nothing else."""
        if not self.parts_only:
            return messages
        return [
            {**message, "content": [{"type": "text", "text": message["content"]}]}
            if isinstance(message.get("content"), str) else message for message in messages
        ]  # fmt: skip

    def marks(self, messages: list[Row], tools: Any, kwargs: dict[str, Any]) -> list[tuple[int, int]] | None:
        """Characters inside the template's own `{% generation %}` marks, or None where it has none."""
        source = self.source(tools)
        if not GENERATION.search(source):
            return None
        plain = [{key: value for key, value in message.items() if value is not None} for message in self.shaped(messages)]
        options = {**self.tokenizer.special_tokens_map, **kwargs}
        try:
            _, found = render_jinja_template(
                [plain], tools or None, chat_template=source, return_assistant_tokens_mask=True, **options
            )
        except FAULTS:
            return None
        return [(int(start), int(end)) for start, end in found[0]]


class Conversation:
    """A row's messages in one form, with what was rendered of them already."""

    def __init__(self, renderer: Renderer, messages: list[Row], tools: Any, kwargs: dict[str, Any], form: Form) -> None:
        self.renderer, self.messages, self.tools, self.kwargs, self.form = renderer, messages, tools, kwargs, form
        self.formed = [form(message) for message in messages]
        self._done: dict[tuple[int, bool], str] = {}

    def text(self, count: int, prompt: bool = False) -> str:
        """The first `count` messages; none at all is the empty text."""
        if count == 0:
            return ""
        key = count, prompt
        if key not in self._done:
            self._done[key] = self.renderer.render(self.formed[:count], self.tools, self.kwargs, prompt)
        return self._done[key]

    def extended(self, count: int, *more: Row) -> str:
        """The first `count` messages, and others after them."""
        return self.renderer.render([*self.formed[:count], *(self.form(message) for message in more)], self.tools, self.kwargs)

    def marks(self) -> list[tuple[int, int]] | None:
        return self.renderer.marks(self.formed, self.tools, self.kwargs)


def standard(messages: list[Row]) -> list[Row]:
    """Messages whose tool arguments are objects, also where a row has them as JSON text."""
    return [
        {**message, "tool_calls": _calls(message, _parsed)} if message.get("tool_calls") else message for message in messages
    ]


def forms(messages: list[Row]) -> Iterator[Form]:
    """The forms to try, in order. Only the first is needed where no message has tool calls or lacks its content."""
    calls = any(message.get("tool_calls") for message in messages)
    bare = any(message.get("content") is None for message in messages)
    for as_text in (False, True) if calls else (False,):
        for filled in (False, True) if bare else (False,):
            yield _form(as_text, filled)


def _form(as_text: bool, filled: bool) -> Form:
    def form(message: Row) -> Row:
        changed = {key: value for key, value in message.items() if key not in OURS}
        if filled and changed.get("content") is None:
            changed["content"] = ""
        if as_text and changed.get("tool_calls"):
            changed["tool_calls"] = _calls(changed, dump_arguments)
        return changed

    return form


def dump_arguments(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _calls(message: Row, change: Callable[[Any], Any]) -> list[Any]:
    return [
        {**call, "function": {**call["function"], "arguments": change(call["function"].get("arguments", {}))}}
        for call in message["tool_calls"]
    ]


def _parsed(arguments: Any) -> Any:
    if isinstance(arguments, str):
        try:
            value = json.loads(arguments)
        except ValueError:
            return arguments
        return value if isinstance(value, dict) else arguments
    return arguments


def _own(tokenizer: Any) -> dict[str, str]:
    own = getattr(tokenizer, "chat_template", None)
    return own if isinstance(own, dict) else {"default": own} if own else {}


def has_template(processor: Any, config: ChatTemplateConfig) -> bool:
    """Whether there is a chat template: the checkpoint's, or one that was named."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if config.file or config.jinja or config.variant or _own(processor) or _own(tokenizer):
        return True
    return (Path(str(getattr(tokenizer, "name_or_path", ""))) / "chat_template.json").is_file()


def _given(tokenizer: Any, config: ChatTemplateConfig, processor: Any = None) -> tuple[str | None, str]:
    """The Jinja text to use instead of the tokenizer's choice, and where it comes from. A processor's own template goes before
    its tokenizer's, as it does in inference."""
    chosen = [name for name in ("file", "jinja", "variant") if getattr(config, name)]
    if len(chosen) > 1:
        raise RequestError(f"template.{chosen[0]} and template.{chosen[1]} exclude each other; give one")
    if config.file:
        try:
            return Path(config.file).read_text(encoding="utf-8"), f"template.file: {config.file}"
        except OSError as err:
            raise RequestError(f"template.file: {config.file} cannot be read: {err.strerror}") from None
        except UnicodeDecodeError:
            raise RequestError(f"template.file: {config.file} is not UTF-8 text") from None
    if config.jinja:
        return config.jinja, "template.jinja"
    own = _own(processor) or _own(tokenizer)
    if config.variant:
        if config.variant not in own:
            offered = f"it has: {', '.join(sorted(own))}" if own else "it has none"
            raise RequestError(f"template.variant: this checkpoint has no chat template {config.variant!r}; {offered}")
        return own[config.variant], f"template.variant: {config.variant}"
    if own and own == _own(tokenizer):
        return None, "the checkpoint"
    if own and "default" in own:
        return own["default"], "the checkpoint's processor"
    legacy = Path(str(getattr(tokenizer, "name_or_path", ""))) / "chat_template.json"  # older multimodal checkpoints
    if legacy.is_file():
        try:
            return str(json.loads(legacy.read_text(encoding="utf-8"))["chat_template"]), str(legacy)
        except (OSError, ValueError, LookupError, TypeError) as err:
            raise RequestError(f"{legacy}: no chat template can be read from it: {err}") from None
    raise RequestError("this checkpoint ships no chat template; give one with template.file=FILE.jinja")
