"""The mask rule: which characters of a rendering one assistant turn trains.

X is the rendering up to and with the turn, P the rendering before it with the generation prompt. Training starts where P
ends, and ends where X parts ways with its continuation by another message. What is the same for all rows of a template,
such as the text that closes a turn, is learnt once from a probe whose words no template writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from swift_core.types import Row

from swift_plugin_transformers.markers import Markers, common_prefix, common_suffix, place
from swift_plugin_transformers.presence import as_python, as_quoted, disguised, missing, reasoning, shorten, texts
from swift_plugin_transformers.rendering import Conversation, Refused, Renderer
from swift_plugin_transformers.thinking import ANSWER, USER, Block, find_block, has_reasoning, probe

NEXT: Row = {"role": "user", "content": "x"}


class Unfit(Refused):
    """The template renders the row, but not what the assistant says as it says it."""


@dataclass(frozen=True)
class Turn:
    """Where one assistant turn is trained: characters [start, end) of `text`, the rendering up to it, but for [start, hole)."""

    index: int
    text: str
    start: int
    hole: int  # end of an empty thinking block that the template put at the start; `start` if none
    end: int
    appended: str | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """What a template does with every plain turn, for one set of arguments."""

    block: Block
    tail: str | None = None  # what follows an answer that ends the conversation; None where the probe was refused
    kept: int = 0  # characters of `tail` that end the turn; 0 if it holds no end marker
    follow: str | None = None  # the marker that comes next where `tail` holds none
    always: str = ""  # a generation prompt that is written after every conversation
    header: str = ""  # the generation prompt
    sure: bool = True  # False where the probe was refused, which may be due to the row's own tools


def learn(renderer: Renderer, tools: Any, kwargs: dict[str, Any], markers: Markers) -> Facts:
    """Facts of a template, from a conversation of one question and one answer."""
    block, messages = find_block(renderer, tools, kwargs, markers) or Block.of(), probe(False)
    try:
        bare = renderer.render(messages[:1], tools, kwargs)
        prompt = renderer.render(messages[:1], tools, kwargs, prompt=True)
        text = renderer.render(messages, tools, kwargs)
        after = renderer.render([*messages, NEXT], tools, kwargs)
    except Refused:
        return Facts(block, sure=False)
    said = text.rfind(ANSWER) + len(ANSWER)
    if text.count(ANSWER) != 1 or USER not in prompt or USER not in after:
        return Facts(block)
    always = _always(prompt, text, after, said, markers)
    header = always or prompt[markers.shared(prompt, bare) :]
    body = text[: len(text) - len(always)]
    openers = markers.all(text, min(len(prompt), said), said)
    try:
        end, follow = _ending(body, after, said, openers if header else openers[1:], markers)
    except Unfit:
        return Facts(block)  # said of each row, where it stands
    return Facts(block, text[said:], 0 if follow else end - said, follow, always, header)


def _always(prompt: str, text: str, after: str, said: int, markers: Markers) -> str:
    """The generation prompt of a template that writes one after every conversation (Command R7B, Firefunction), else "".

    Then X and its continuation part ways inside that prompt, and all three renderings end alike. Its opening marker may stand
    before the place where they part; it is told from an end marker by its count, one above that of the marker before it,
    in each of the three.
    """
    shared = markers.shared(text, after)
    rest = text[shared:]
    if shared <= said or not rest.strip() or not (prompt.endswith(rest) and after.endswith(rest)):
        return ""
    found = list(markers.pattern.finditer(text, said, shared))
    if len(found) > 1 and found[-1].end() == len(text[:shared].rstrip()):
        closer, opener = found[-2].group(), found[-1].group()
        if all(whole.count(opener) == whole.count(closer) + 1 for whole in (prompt, text, after)):
            return text[found[-1].start() :]
    return rest


def _ending(body: str, after: str, said: int, openers: list[str], markers: Markers) -> tuple[int, str | None]:
    """Where a turn ends whose sayings end at `said`, and the marker to append where the rendering holds no end marker."""
    end = len(body[: markers.shared(body, after)].rstrip())
    if end <= said:
        end = len(body.rstrip())
    tail = markers.all(body, said, end)
    if tail and not markers.closes(tail[-1], [*openers, *tail[:-1]]):
        return end, None
    end = len(body.rstrip())
    at = place(body[:end], after)
    follow = markers.first(after, at) if at >= 0 else None
    if follow is None:
        raise Unfit("the chat template writes no end marker after the answer")
    return end, follow


def find_turn(conversation: Conversation, index: int, facts: Facts, markers: Markers) -> Turn:
    """The turn of message `index`. Raises Unfit where the template leaves out what the assistant says, or ends it nowhere."""
    message = conversation.messages[index]
    text, prompt = conversation.text(index + 1), conversation.text(index, prompt=True)
    notes: list[str] = []
    start, matches = len(prompt), text.startswith(prompt)
    body = text[: len(text) - len(facts.always)] if facts.always and text.endswith(facts.always) else text
    said = len(text) - len(facts.tail or "")
    plain = not message.get("tool_calls") and facts.tail is not None and text.endswith(facts.tail)
    hidden = None if plain and matches and index and start <= said else _hidden(conversation, index)
    if not matches or not index:
        start = _start(conversation, index, hidden, facts, markers)
        notes += [] if matches else ["prompt-mismatch"]
    if plain and start <= said:
        end, follow = said + facts.kept, facts.follow
    else:
        said = _said(message, text, body, start, hidden)
        openers = _template_markers(text, start, said, hidden, markers)
        openers = openers if facts.header else openers[1:]  # without a generation prompt, the first opens the message itself
        try:
            end, follow = _ending(body, _continued(conversation, index), max(said, start), openers, markers)
        except Unfit as err:
            raise Unfit(f"message {index}: {err}") from None
        if follow and not message.get("tool_calls") and facts.kept:
            raise Unfit(f"message {index}: the chat template writes no end marker after it, as it does after other answers")
    if follow:
        text = text[: max(start, len(text[:end].rstrip()))] + follow
        end = len(text)
    _check(conversation, index, text, start, max(said, start), hidden, facts.block)
    hole = start
    if not reasoning(message).strip():
        hole = min(end, facts.block.injected(text, start, prompt or text[:start], next(iter(texts(message)), "")))
        if hole > start:
            notes.append("thinking-block")
        elif matches and facts.block.left_open(prompt) and not has_reasoning(message, facts.block):
            notes.append("open-thinking")  # the answer stands where thoughts should: no switch of the template closes it
    return Turn(index, text, start, hole, end, follow, tuple(notes))


def _hidden(conversation: Conversation, index: int) -> str | None:
    """The rendering with the turn's sayings disguised, or None where the template refuses those."""
    variant, words = disguised(conversation.messages[index])
    try:
        found = conversation.extended(index, variant)
    except Refused:
        return None
    for word, what in words.items():
        if word not in found:
            raise Unfit(f"the chat template leaves out what the assistant says: {what}")
    return found


def _start(conversation: Conversation, index: int, hidden: str | None, facts: Facts, markers: Markers) -> int:
    """Where a turn starts whose rendering does not begin with its prompt, or which opens the conversation.

    The two part ways at the common prefix, whatever the answer is: an answer may happen to begin as the prompt goes on. Where
    they part in an earlier message already (Mistral moves the system message about), the turn starts after the last header
    of the prompt that stands before the answer, and at the answer itself where there is none.
    """
    text, prompt = conversation.text(index + 1), conversation.text(index, prompt=True)
    says = common_prefix(text, hidden) if hidden is not None else len(text)
    if index == 0:
        at = _after_header(text, facts.header, 0, says, markers)
        return says if at is None else at
    shared = min(markers.shared(text, prompt), markers.shared(hidden, prompt) if hidden is not None else len(text))
    before = conversation.text(index).removesuffix(facts.always).rstrip()
    if hidden is None or text.startswith(before):
        return shared
    at = _after_header(text, prompt[shared:], shared, says, markers)
    if at is not None:
        return at
    earlier = [said.strip() for message in conversation.messages[:index] for said in texts(message)][-1:]
    return shared if all(said in text[:shared] for said in earlier) else says


def _after_header(text: str, header: str, low: int, high: int, markers: Markers) -> int | None:
    """The place in text[low:high] after the last part of a generation prompt that stands there, if one does. A part is a
    marker with what follows it: the parts after the one that is found may be an injected block."""
    starts = [found.span() for found in markers.pattern.finditer(header)]
    for number in range(len(starts) - 1, -1, -1):
        begin, end = starts[number]
        part = header[begin : starts[number + 1][0] if number + 1 < len(starts) else len(header)]
        at = text.rfind(header[begin:end], low, high)
        if at >= 0:
            return min(high, at + common_prefix(text[at : at + len(part)], part))
    return None


def _template_markers(text: str, start: int, said: int, hidden: str | None, markers: Markers) -> list[str]:
    """Markers inside the turn that the template wrote: those of the disguised rendering, which holds none of an answer."""
    if hidden is None:
        return markers.all(text, start, said)
    return markers.all(hidden, min(start, len(hidden)), len(hidden) - common_suffix(text, hidden))


def _said(message: Row, text: str, body: str, start: int, hidden: str | None) -> int:
    """Where the sayings of a message end in its rendering."""
    if hidden is not None:
        return max(start, len(text) - common_suffix(text, hidden))
    parts = [*texts(message), *(call["function"]["name"] for call in message.get("tool_calls") or [])]
    found = [body.rfind(part.strip(), start) + len(part.strip()) for part in parts if part.strip() in body[start:]]
    return max(found, default=start)


def _continued(conversation: Conversation, index: int) -> str:
    """The rendering with one more message: a call's result, where the template takes it, else the user's."""
    for call in (conversation.messages[index].get("tool_calls") or [])[:1]:
        result = {"role": "tool", "content": "x", "name": call["function"]["name"], "tool_call_id": call.get("id", "")}
        try:
            return conversation.extended(index + 1, result)
        except Refused:
            break
    return conversation.extended(index + 1, NEXT)


def _check(conversation: Conversation, index: int, text: str, start: int, said: int, hidden: str | None, block: Block) -> None:
    """Refuse a turn whose trained text lacks what the assistant says, or holds its arguments in a form that no tool reads."""
    message, formed = conversation.messages[index], conversation.formed[index]
    if hidden is None and message.get("tool_calls"):
        _hidden(conversation, index)
    opened = block.opened.search(text[max(0, start - 200) : start])
    lead = text[max(0, start - 200) : start][opened.start() :] if opened else ""
    region = lead + text[start:said]
    stripped = _without_empty(message, block)
    lacks = missing(stripped, region if not message.get("tool_calls") else lead + text[start:])
    if lacks:
        raise Unfit(f"the chat template leaves out what the assistant says: {lacks}")
    name = as_python(formed, text[start:])
    if name:
        raise Unfit(f"the chat template writes the arguments of the tool call {shorten(name)} as Python, not as JSON")
    name = as_quoted(formed, text[start:])
    if name:
        raise Unfit(f"the chat template quotes the arguments of the tool call {shorten(name)} twice")


def _without_empty(message: Row, block: Block) -> Row:
    """The message without an empty thinking block of its own, which a template may write into the prompt instead."""
    content: Any = message.get("content")
    if isinstance(content, str) and (found := block.empty.match(content.lstrip())):
        return {**message, "content": content.lstrip()[found.end() :]}
    return message
