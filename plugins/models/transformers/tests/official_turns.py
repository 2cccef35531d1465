"""What is to be trained of a row, worked out from transformers' own rendering and a table read off the templates by hand.

`turn_of` gives the bounds of one assistant turn, `why_not` the reason why a row cannot be trained on. Nothing here knows
of the template under test.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from typing import Any

SENTINEL = "Zq7sentinelqZ"
MARKER = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z_]{2,}\]")
# A thought with nothing in it: written by the template, never said by the assistant.
EMPTY_THOUGHT = re.compile(
    r"\s*(?:<think>\s*</think>|<\|channel>thought\n<channel\|>|<\|START_THINKING\|>(?:None)?<\|END_THINKING\|>)"
)
THOUGHT_CLOSES = re.compile(r"\s*</think>")
THOUGHT = re.compile(r"</?think>")

# What ends an assistant turn, read in each template: {file: (after an answer, after tool calls)}. "eos" is the tokenizer's
# end-of-text token; None where the template itself writes no end (the header of the next message ends the turn).
IM = "<|im_end|>"
ENDS: dict[str, tuple[str | None, str | None]] = {
    "Apriel-1.6-15b-Thinker-fixed": (None, None),
    "Bielik-11B-v3.0-Instruct": (IM, IM),
    "ByteDance-Seed-OSS": ("<seed:eos>", "<seed:eos>"),
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": ("<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    "GLM-4.6": (None, None),
    "GLM-5.2": (None, None),
    "GigaChat3-10B-A1.8B": ("<|message_sep|>", "<|message_sep|>"),
    "HuggingFaceTB-SmolLM3-3B": (IM, IM),
    "Kimi-K2-Instruct": (IM, IM),
    "LFM2-8B-A1B": (IM, IM),
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": (IM, IM),
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": (IM, IM),
    "Qwen-Qwen2.5-7B-Instruct": (IM, IM),
    "Qwen-Qwen3-0.6B": (IM, IM),
    "Qwen3-Coder": (IM, IM),
    # A lone call is left open; the second of two parallel calls closes the list and the turn.
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": ("<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": ("<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "deepseek-ai-DeepSeek-V3.1": ("<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "fireworks-ai-llama-3-firefunction-v2": ("<|eot_id|>", "<|eot_id|>"),
    "google-gemma-2-2b-it": ("<end_of_turn>", "<end_of_turn>"),
    "google-gemma-4-31B-it-interleaved": ("<turn|>", "<turn|>"),
    "meetkai-functionary-medium-v3.2": ("<|eot_id|>", "<|eot_id|>"),
    "meta-llama-Llama-3.1-8B-Instruct": ("<|eot_id|>", "<|eot_id|>"),
    "meta-llama-Llama-3.3-70B-Instruct": ("<|eot_id|>", "<|eot_id|>"),
    "microsoft-Phi-3.5-mini-instruct": ("<|end|>", "<|end|>"),
    "mistralai-Mistral-Nemo-Instruct-2407": ("eos", "eos"),
    "moonshotai-Kimi-K2": (IM, IM),
    "openai-gpt-oss-120b": ("<|return|>", "<|call|>"),
    "unsloth-mistral-Devstral-Small-2507": ("eos", "eos"),
}


class Unrenderable(Exception):
    """The template itself raises on these messages."""


@dataclass
class Renderer:
    """transformers' rendering of one template with one tokenizer, remembered."""

    name: str
    tokenizer: Any
    source: str | None  # None: the tokenizer's own template
    seen: dict[str, Any] = field(default_factory=dict)

    def _apply(self, messages: list[Any], tools: Any, kwargs: dict[str, Any], prompt: bool, ids: bool) -> Any:
        key = json.dumps([str(date.today()), messages, tools, kwargs, prompt, ids], ensure_ascii=False)  # some write the date
        if key not in self.seen:
            options: dict[str, Any] = {"tools": tools, "chat_template": self.source, "add_generation_prompt": prompt}
            if ids:
                options["return_dict"] = False
            try:
                self.seen[key] = self.tokenizer.apply_chat_template(messages, tokenize=ids, **options, **kwargs)
            except Exception as err:  # of Jinja, or of the Python that it calls
                self.seen[key] = Unrenderable(f"{type(err).__name__}: {err}")
        found = self.seen[key]
        if isinstance(found, Unrenderable):
            raise found
        return found

    def text(self, messages: list[Any], tools: Any, kwargs: dict[str, Any], prompt: bool = False) -> str:
        return str(self._apply(messages, tools, kwargs, prompt, ids=False))

    def ids(self, messages: list[Any], tools: Any, kwargs: dict[str, Any], prompt: bool = False) -> list[int]:
        return list(self._apply(messages, tools, kwargs, prompt, ids=True))

    def end(self, message: dict[str, Any]) -> str | None:
        mark = ENDS[self.name][1 if message.get("tool_calls") else 0]
        return self.tokenizer.eos_token if mark == "eos" else mark


# --- what a row says


def forms(messages: list[dict[str, Any]], joined: bool = True) -> list[list[dict[str, Any]]]:
    """The same messages in the forms that templates differ in; the row's own comes first.

    Parts of text may be joined for a template that takes none: inference has to do so too, so nobody is forced to.
    """
    found: list[list[dict[str, Any]]] = []
    for text_parts, *options in itertools.product((False, True) if joined else (False,), *[(False, True)] * 3):
        form = [_form(message, *options, text_parts) for message in messages]
        if form not in found:
            found.append(form)
    return found


def _form(message: dict[str, Any], text_arguments: bool, empty: bool, thinking: bool, joined: bool) -> dict[str, Any]:
    form = {key: value for key, value in message.items() if key not in ("train", "weight")}
    if empty and form.get("content") is None:
        form["content"] = ""
    if joined and isinstance(form.get("content"), list) and all("text" in part for part in form["content"]):
        form["content"] = "".join(part["text"] for part in form["content"])
    if thinking and form.get("reasoning_content"):
        form["thinking"] = form["reasoning_content"]
    if text_arguments and form.get("tool_calls"):
        calls = json.loads(json.dumps(form["tool_calls"]))
        for call in calls:
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        form["tool_calls"] = calls
    return form


def pieces(message: dict[str, Any]) -> list[list[str]]:
    """What the assistant says: each piece in the spellings in which a template may write it."""
    content = message.get("content")
    texts = [part.get("text", "") for part in content] if isinstance(content, list) else [content or ""]
    texts = [piece for text in texts for piece in (THOUGHT.split(text) if "</think>" in text else [text])]
    found = [_spellings(text.strip()) for text in [*texts, message.get("reasoning_content") or ""] if text.strip()]
    for call in message.get("tool_calls") or ():
        found.append([call["function"]["name"]])
        found += [[key] for key in call["function"]["arguments"]]
        found += [_spellings(leaf) for leaf in _leaves(call["function"]["arguments"]) if leaf != ""]
    return found


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for each in value.values():
            yield from _leaves(each)
    elif isinstance(value, list):
        for each in value:
            yield from _leaves(each)
    else:
        yield value


def _spellings(value: Any) -> list[str]:
    if not isinstance(value, str):
        return [json.dumps(value), str(value)]
    quoted = [json.dumps(value, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True)]
    return [value, *quoted, *(json.dumps(text)[1:-1] for text in quoted)]


def reasons_aloud(message: dict[str, Any]) -> bool:
    return bool(message.get("reasoning_content")) or "</think>" in str(message.get("content"))


def wanted(messages: list[dict[str, Any]]) -> list[int]:
    """Indexes of the messages to train."""
    return [
        index
        for index, message in enumerate(messages)
        if message["role"] == "assistant" and message.get("train") is not False and message.get("weight", 1) != 0
    ]


# --- what is trained of a turn


@dataclass(frozen=True)
class Turn:
    """A turn as the last of its rendering `text`: where training may start, and where it ends (None: not written)."""

    text: str
    starts: tuple[int, ...]
    end: int | None
    mismatch: bool  # the generation prompt is not what stands before the answer
    early: bool  # they differ before the end of what came before the assistant
    injected: bool  # the template puts an empty thought between the prompt and the answer

    @property
    def trained(self) -> str:
        return self.text[self.starts[0] : self.end]


def common(first: str, second: str) -> int:
    """Length of the beginning that two texts share."""
    differ = (index for index, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)
    return next(differ, min(len(first), len(second)))


def uncut(at: int, *texts: str) -> int:
    """`at`, moved back to the start of a marker of the texts that it cuts."""
    return min([at, *(m.start() for text in texts for m in MARKER.finditer(text) if m.start() < at < m.end())])


def turn_of(renderer: Renderer, messages: list[dict[str, Any]], tools: Any, kwargs: dict[str, Any], k: int) -> Turn:
    """The rule of the mask, for message `k`. Raises Unrenderable."""
    text = renderer.text(messages[: k + 1], tools, kwargs)
    prompt = renderer.text(messages[:k], tools, kwargs, prompt=True) if k else ""
    start, mismatch, early = len(prompt), not text.startswith(prompt), False
    if mismatch:
        start, early = shared_start(renderer, messages, tools, kwargs, k, text, prompt)
    starts, injected = (start,), False
    if not reasons_aloud(messages[k]):
        thought = EMPTY_THOUGHT.match(text, start)
        if thought is None and text[:start].rstrip().endswith("<think>"):
            thought = THOUGHT_CLOSES.match(text, start)
        if thought:
            injected = True
            blank = len(text) - len(text[thought.end() :].lstrip())
            starts = (*range(thought.end(), blank + 1), start)
    mark = renderer.end(messages[k])
    at = text.rfind(mark, start) if mark else -1
    return Turn(text, starts, at + len(mark) if mark and at >= 0 else None, mismatch, early, injected)


def shared_start(
    renderer: Renderer, messages: list[dict[str, Any]], tools: Any, kwargs: dict[str, Any], k: int, text: str, prompt: str
) -> tuple[int, bool]:
    """Where the answer starts in a text that does not begin with the prompt, and whether they differ before its header.

    The header of the answer follows the last thing that was said before it: found by saying another thing there. What the
    answer itself happens to share with the prompt is not the prompt's: found by answering other things.
    """
    marked = [*messages[: k - 1], {**messages[k - 1], "content": SENTINEL}]

    def after(*answer: dict[str, Any]) -> str:
        return renderer.text([*marked, *answer], tools, kwargs, prompt=not answer).rpartition(SENTINEL)[2]

    own, head = after(messages[k]), after()
    others = [after(_other(messages[k], start)) for start in ("Zq", "7x")]
    at = uncut(min(common(answer, head) for answer in (own, *others)), own, head)
    # Where they differ sooner, as after a tool's result, the header that opens the answer is still the prompt's.
    closed = renderer.text(messages[:k], tools, kwargs)
    header = prompt[len(closed) :] if prompt.startswith(closed) else ""
    found = own.find(header, at) if header.strip() else -1
    if 0 <= found <= min(common(own, answer) for answer in others) - len(header):
        at = found + len(header)
    before = len(text) - len(own)
    return before + at, common(text, prompt) < before


def _other(message: dict[str, Any], start: str) -> dict[str, Any]:
    """The message with another beginning to all that it says."""
    other = json.loads(json.dumps(message))
    for key in ("content", "reasoning_content", "thinking"):
        if isinstance(other.get(key), str) and other[key] and "</think>" not in other[key]:
            other[key] = start + other[key]
        elif key == "content" and isinstance(other.get(key), list):
            other[key] = [{**part, "text": start + part.get("text", "")} for part in other[key]]
    for call in other.get("tool_calls") or ():
        call["function"]["name"] = start + call["function"]["name"]
    return dict(other)


def left_out(message: dict[str, Any], text: str) -> str | None:
    """The first thing of the assistant's that the text lacks."""
    return next((spellings[0] for spellings in pieces(message) if not any(each in text for each in spellings)), None)


def absent(message: dict[str, Any], trained: str) -> str | None:
    """The first thing of the assistant's that the trained text lacks, or a None that it never said."""
    lacking = left_out(message, trained)
    if lacking is None and "None" in trained:
        said = json.dumps(message, ensure_ascii=False)
        spoken = "None" in said or "null" in said.replace('"content": null', "")
        return None if spoken else "None"
    return lacking


def unheard(renderer: Renderer, form: list[dict[str, Any]], tools: Any, kwargs: dict[str, Any], k: int) -> str | None:
    """What the assistant says in message `k` that the template does not use: other words there change nothing."""
    text = renderer.text(form[: k + 1], tools, kwargs)
    for key in ("content", "reasoning_content"):
        said = form[k].get(key)
        if isinstance(said, str) and said.strip():
            other = {**form[k], key: _other({key: said}, "Zq")[key]}
            if key == "reasoning_content" and "thinking" in other:
                other["thinking"] = other[key]
            if other != form[k] and renderer.text([*form[:k], other], tools, kwargs) == text:
                return str(said)
    return None


def why_not(renderer: Renderer, row: dict[str, Any], form: list[dict[str, Any]], kwargs: dict[str, Any]) -> str | None:
    """Why this form of the row cannot be trained on, or need not be, or None where it can."""
    tools = row.get("tools")
    try:
        renderer.text(form, tools, kwargs)
        for k in wanted(row["messages"]):
            turn = turn_of(renderer, form, tools, kwargs, k)
            lacking = absent(row["messages"][k], turn.trained) or unheard(renderer, form, tools, kwargs, k)
            if lacking is not None:
                return f"message {k}: {lacking!r} is left out or made up"
            if turn.early:
                return f"message {k}: the prompt is not what stands before the answer"
            if turn.end is None and (renderer.end(form[k]) or not followers(renderer, form, tools, kwargs, k)):
                return f"message {k}: nothing ends the turn"
    except Unrenderable as err:
        return f"unrenderable: {err}"
    if not wanted(row["messages"]):
        return "nothing to train"
    rendered = renderer.text(form, tools, kwargs)
    lost = [left_out(message, rendered) for message in row["messages"] if message.get("train") is False]
    return next((f"{lacking!r} of an untrained message is left out" for lacking in lost if lacking), None)


def followers(renderer: Renderer, form: list[Any], tools: Any, kwargs: dict[str, Any], k: int) -> set[str]:
    """First markers after turn `k`: before a user's message, a result of its call, and the message that does follow."""
    found = set()
    if not form[k].get("tool_calls"):  # after any answer comes the same
        form = [*form[:k], {"role": "assistant", "content": "7x answer"}, *form[k + 1 :]]
    longer = [[*form[: k + 1], {"role": "user", "content": SENTINEL}]]
    if k + 1 < len(form):
        longer.append([*form[: k + 1], {**form[k + 1], "content": SENTINEL}])
    for call in (form[k].get("tool_calls") or ())[:1]:
        result = {"role": "tool", "tool_call_id": call["id"], "name": call["function"]["name"], "content": SENTINEL}
        longer.append([*form[: k + 1], result])
    text = renderer.text(form[: k + 1], tools, kwargs).rstrip()
    for messages in longer:
        try:
            head = renderer.text(messages, tools, kwargs).rpartition(SENTINEL)[0]
        except Unrenderable:
            continue
        # A longer conversation may lose earlier thinking: as much of the turn's last words as it keeps is looked for.
        kept = next(length for length in (len(text), 60, 30, 15, 8, 4, 2, 1, 0) if text[len(text) - length :] in head)
        at = head.rfind(text[len(text) - kept :]) + kept
        found |= set(MARKER.findall(head[at:])[:1])
    return found
