"""The thinking switch of a chat template, and the empty thinking block that some write before a plain answer.

A row without reasoning must not teach a model to stop thinking. So it is rendered with thinking off where the template has
a switch for it: then the empty block belongs to the prompt. Nothing is known of any template beforehand: its switches are the
variables that it reads and does not set, tried out on a probe.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import Environment, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from swift_core.types import Row

from swift_plugin_transformers.markers import Markers
from swift_plugin_transformers.presence import reasoning, texts
from swift_plugin_transformers.rendering import Refused, Renderer

NOT_SWITCHES = {
    "messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now", "namespace", "range", "dict",
    "loop", "caller", "joiner", "cycler", "lipsum", "continue_final_message",
}  # fmt: skip
THINKING = re.compile("think|thought|reason|analysis", re.IGNORECASE)
INSIDE, ENDS = r"[^<>\[\]\s]*", r"(?:/|end|close)"
OPENS = rf"[<\[](?!{INSIDE}{ENDS}){INSIDE}(?:think|thought|reason){INSIDE}[>\]]"  # a marker about thinking that opens it
CLOSES = rf"[<\[](?={INSIDE}{ENDS}){INSIDE}(?:think|thought|reason){INSIDE}[>\]]"
CALL = {"id": "call00001", "type": "function", "function": {"name": "look_up", "arguments": {"word": "tea"}}}
USER, ANSWER, THOUGHT = "Zq7uz", "Zq8wz", "Zq9tz"  # texts of a probe, that no template writes
PROBES = 48  # renderings spent at most on finding a switch


@dataclass(frozen=True)
class Block:
    """How a template writes reasoning: what opens it, and what closes it."""

    empty: re.Pattern[str]
    opened: re.Pattern[str]
    closing: re.Pattern[str]

    @classmethod
    def of(cls, opening: str = "", closing: str = "") -> Block:
        first, last = OPENS, CLOSES
        if opening.strip() and closing.strip():
            first, last = f"(?:{re.escape(opening.strip())}|{OPENS})", f"(?:{re.escape(closing.strip())}|{CLOSES})"
        flags = re.IGNORECASE
        return cls(
            re.compile(rf"{first}\s*{last}", flags), re.compile(rf"{first}\s*\Z", flags), re.compile(last, flags)
        )  # fmt: skip

    def injected(self, text: str, start: int, prompt: str, content: str = "") -> int:
        """Where an empty block ends that the template wrote at `start`, or that it closed there after the prompt opened it;
        `start` if it wrote none. Blanks with which the content begins are not the block's, nor is a block of its own."""
        if self.empty.match(content.lstrip()):
            return start
        at = start + len(text[start:]) - len(text[start:].lstrip())
        found = self.empty.match(text, at)
        if found is None and self.opened.search(prompt[-200:]):
            found = self.closing.match(text, at)
        if found is None:
            return start
        lead = content[: len(content) - len(content.lstrip())]
        blanks = len(text) - found.end() - len(text[found.end() :].lstrip())
        return found.end() + blanks - (len(lead) if text[found.end() : found.end() + blanks].endswith(lead) else 0)

    def left_open(self, prompt: str) -> bool:
        """Whether a prompt ends with a block that it opens."""
        return self.opened.search(prompt[-200:]) is not None and not self.closed(prompt)

    def closed(self, prompt: str) -> bool:
        """Whether a prompt ends with an empty block."""
        tail = prompt.rstrip()[-400:]
        return any(found.end() == len(tail) for found in self.empty.finditer(tail))

    def thoughts(self, content: str) -> bool:
        """Whether an answer's own text holds reasoning: more than an empty block before a closing marker."""
        rest = self.empty.sub("", content, count=1) if self.empty.match(content.lstrip()) else content
        return self.closing.search(rest) is not None


def has_reasoning(message: Row, block: Block) -> bool:
    return bool(reasoning(message).strip()) or any(block.thoughts(text) for text in texts(message))


def probe(reasoned: bool) -> list[Row]:
    answer: Row = {"role": "assistant", "content": ANSWER}
    return [{"role": "user", "content": USER}, {**answer, "reasoning_content": THOUGHT} if reasoned else answer]


def find_block(renderer: Renderer, tools: Any, kwargs: dict[str, Any], markers: Markers) -> Block | None:
    """The block's markers, from a probe with reasoning; markers named after thinking where the template takes none. None
    where it refuses the probe, which may be due to the row's own tools."""
    at, text, refused = -1, "", 0
    question, answer = probe(True)
    for message in (answer, {**answer, "tool_calls": [CALL]}):  # some write reasoning before a tool call only
        try:
            text = renderer.render([question, message], tools, kwargs)
        except Refused:
            refused += 1
            continue
        at = text.find(THOUGHT)
        if at >= 0:
            break
    if refused == 2:
        return None
    before = list(markers.pattern.finditer(text, 0, max(at, 0)))[-3:]
    after = list(markers.pattern.finditer(text, at + len(THOUGHT)))[:3]
    if at < 0 or not before or not after or text[at + len(THOUGHT) : after[0].start()].strip():
        return Block.of()
    # One marker may be too general (`<|sep|>`): then those beside it are taken too, up to one that speaks of thinking.
    openings = [text[found.start() : at] for found in reversed(before)]
    closings = [text[at + len(THOUGHT) : found.end()] for found in after]
    return Block.of(
        next((part for part in openings if THINKING.search(part)), openings[0]),
        next((part for part in closings if THINKING.search(part)), closings[0]),
    )


@dataclass(frozen=True)
class _Verdict:
    clean: bool  # the text begins with the prompt, and nothing is injected after it
    injected: bool  # an empty block comes after the prompt, or after what the two share
    closed: bool  # the prompt ends with an empty block


def choose(
    renderer: Renderer, tools: Any, base: dict[str, Any], block: Block, reasoned: bool, markers: Markers
) -> dict[str, Any] | None:
    """Template arguments for rows with or without reasoning: `base`, and a switch where it serves. Values that the user gave
    are never changed; one that would turn thinking on for plain rows is never chosen. None where a probe tells nothing."""
    names = switches(renderer.source(tools))
    if any(THINKING.search(name) for name in base if name in names):
        return base
    found = _judge(renderer, tools, base, block, reasoned, markers)
    if found is None:
        return None
    if (reasoned and found.clean) or (found.clean and found.closed):
        return base
    tried, usable, milder = 0, None, None
    for name, values in names.items():
        if name in base or (found.clean and not THINKING.search(name)):
            continue
        for value in values:
            tried += 2
            kwargs = {**base, name: value}
            verdict = _judge(renderer, tools, kwargs, block, reasoned, markers) if tried <= PROBES else None
            if verdict is None:
                continue
            if verdict.clean and (reasoned or verdict.closed):
                return kwargs
            if verdict.clean and not found.closed:
                usable = usable or kwargs
            elif found.injected and not verdict.injected and THINKING.search(name):
                milder = milder or kwargs
    return base if found.clean else usable or milder or base


def _judge(
    renderer: Renderer, tools: Any, kwargs: dict[str, Any], block: Block, reasoned: bool, markers: Markers
) -> _Verdict | None:
    messages = probe(reasoned)
    try:
        prompt, text = renderer.render(messages[:1], tools, kwargs, prompt=True), renderer.render(messages, tools, kwargs)
    except Refused:
        return None
    if USER not in prompt or ANSWER not in text or (reasoned and THOUGHT not in text):
        return None
    prefix = text.startswith(prompt)
    if reasoned:
        return _Verdict(prefix and THOUGHT in text[len(prompt) :], False, False)
    start = len(prompt) if prefix else markers.shared(text, prompt)
    injected = block.injected(text, start, prompt) > start
    return _Verdict(prefix and not injected, injected, block.closed(prompt))


class _Generation(Extension):
    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=64)
def switches(source: str) -> dict[str, list[Any]]:
    """Variables that a template reads and does not set, with the values worth trying; those named after thinking first."""
    environment = Environment(extensions=[_Generation, loopcontrols], autoescape=False)  # only parsed, never run
    tree = environment.parse(source)
    names = {name for name in meta.find_undeclared_variables(tree) if name not in NOT_SWITCHES and not name.endswith("_token")}
    constants: dict[str, list[Any]] = {name: [] for name in names}
    for left, right in _comparisons(tree):
        if isinstance(left, nodes.Name) and left.name in constants and isinstance(right, nodes.Const):
            constants[left.name].append(right.value)
    found = {}
    for name in sorted(names, key=lambda name: (not THINKING.search(name), name)):
        values: dict[str, Any] = {}
        for value in (False, True, *constants[name]):
            values.setdefault(json.dumps(value, default=str), value)
        found[name] = list(values.values())
    return found


def _comparisons(tree: nodes.Template) -> Iterator[tuple[nodes.Node, nodes.Node]]:
    for compare in tree.find_all(nodes.Compare):
        for operand in compare.ops:
            listed = operand.expr.items if isinstance(operand.expr, (nodes.List, nodes.Tuple)) else [operand.expr]
            for item in listed:
                yield compare.expr, item
                yield item, compare.expr
