"""Answers read back: every official template's own rendering, in any pieces, and every sentence of its grammar.

What is expected is the message that was rendered. The format is learnt from probes of other words than these.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from swift_core.answers import message_of
from swift_core.config import build_options
from swift_core.errors import RequestError
from swift_core.types import AnswerDelta
from swift_plugin_transformers import hooks
from swift_plugin_transformers.answers.probes import render
from swift_plugin_transformers.config import ChatTemplateConfig

sys.path.insert(0, str(Path(__file__).parent))
from official_rows import Row, call, tool
from official_turns import ENDS
from test_official_templates import load_tokenizer, pair

TOOLS = [tool("weather", city="string", days="integer", hourly="boolean"), tool("clock", zone="string"), tool("ping")]
WEATHER = call(1, "weather", city='Köln "am Rhein" {x}', days=3, hourly=True)
CLOCK = call(2, "clock", zone="Europe/Berlin")
# Templates that write no calls at all; transformers' sandbox refuses Kimi-K2-Instruct's.
WITHOUT = {
    "HuggingFaceTB-SmolLM3-3B", "Kimi-K2-Instruct", "LFM2-8B-A1B", "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
    "google-gemma-2-2b-it", "microsoft-Phi-3.5-mini-instruct",
}  # fmt: skip
ONE_CALL = {
    "GigaChat3-10B-A1.8B",
    "meta-llama-Llama-3.1-8B-Instruct",
    "meta-llama-Llama-3.3-70B-Instruct",
    "openai-gpt-oss-120b",
}
# Templates whose generation prompt closes reasoning that they then write open.
OTHER_PROMPT = {"CohereForAI-c4ai-command-r7b-12-2024-tool_use", "google-gemma-4-31B-it-interleaved"}
CALLING = [name for name in ENDS if name not in WITHOUT]


def read(template: Any, prompt: Sequence[int], ids: Sequence[int], tools: Any = TOOLS, pieces: Any = None) -> list[AnswerDelta]:
    reader, found, at = template.reader(prompt, tools), [], 0
    while at < len(ids):
        step = pieces(len(ids) - at) if pieces else len(ids)
        found += reader.feed(ids[at : at + step])
        at += step
    return found + reader.close() + reader.close()


def joined(deltas: list[AnswerDelta]) -> tuple[str, str, list[tuple[str, str]]]:
    calls: dict[int, list[str]] = {}
    for delta in deltas:
        if delta.call is not None:
            own = calls.setdefault(delta.call, ["", ""])
            own[0], own[1] = own[0] + delta.name, own[1] + delta.arguments
    content, thought = "".join(d.content for d in deltas), "".join(d.reasoning for d in deltas)
    return content, thought, [(name, arguments) for name, arguments in calls.values()]


def answered(name: str, message: Row, tools: Any = TOOLS) -> tuple[Any, list[int], list[int]] | None:
    """The template, a prompt's ids, and the ids of its own rendering of an answer."""
    _, template = pair(name)
    found = render(template, message, tools)
    if found is None:
        return None
    tokenize = template.tokenizer
    before = found.prompt if template.answers.open_prompt and message.get("reasoning_content") else found.before
    prompt, ids = (tokenize(text, add_special_tokens=False)["input_ids"] for text in (before, found.answer))
    return template, prompt, ids


def calls_of(message: Row) -> list[tuple[str, Any]]:
    return [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in message.get("tool_calls") or []]


def wanted(*calls: Row) -> list[tuple[str, Any]]:
    return [(c["function"]["name"], c["function"]["arguments"]) for c in calls]


@pytest.mark.parametrize("name", CALLING)
def test_a_call_is_read_back(name: str) -> None:
    _, template = pair(name)
    assert template.answers.learnt
    for calls in ([WEATHER], [CLOCK]) if name in ONE_CALL else ([WEATHER], [CLOCK], [WEATHER, CLOCK], [CLOCK, CLOCK, WEATHER]):
        found = answered(name, {"content": None, "tool_calls": calls})
        assert found is not None
        template, prompt, ids = found
        if name == "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B":  # it begins another answer after the calls
            ids = trimmed(template, ids)
        message = message_of(read(template, prompt, ids))
        assert calls_of(message) == wanted(*calls)
        assert not message["content"]


@pytest.mark.parametrize("name", CALLING)
def test_any_pieces_give_the_same(name: str) -> None:
    source = random.Random(name)
    messages: list[Row] = [
        {"content": "Let me <look> [x]\n\nat it. ", "tool_calls": [CLOCK]},
        {"content": "A 🦊 says: 日本 <tool_cal [TOOL ```json {", "reasoning_content": "Two\n\nlines 🇩🇪."},
        {"content": None, "tool_calls": [WEATHER] if name in ONE_CALL else [WEATHER, CLOCK]},
    ]
    for message in messages:
        found = answered(name, message)
        if found is None:
            continue
        whole = joined(read(*found))
        for pieces in (lambda _: 1, *[lambda left: source.randint(1, min(7, left))] * 4):
            assert joined(read(*found, pieces=pieces)) == whole


@pytest.mark.parametrize("name", ENDS)
def test_plain_content_is_what_was_said(name: str) -> None:
    said = "First.\n\n  - indented <b>x</b> [1]\n```py\nif x < 1:\n    y = {}\n```\n🦊 Last."
    found = answered(name, {"content": said}, None if name in WITHOUT else TOOLS)
    assert found is not None
    content, thought, calls = joined(read(*found, tools=TOOLS))
    assert (content, thought, calls) == (said, "", [])


@pytest.mark.parametrize("name", ENDS)
def test_reasoning_is_apart(name: str) -> None:
    said = {"content": "It is 4.", "reasoning_content": "Two and two.\n\nSo four."}
    found = answered(name, said, None)
    if found is None or "So four." not in found[0].tokenizer.decode([*found[1], *found[2]]):
        pytest.skip("the template writes no reasoning")
    message = message_of(read(*found))
    assert (message["content"], message.get("reasoning_content")) == (said["content"], said["reasoning_content"])


def opened(jinja: str, *tokens: str) -> Any:
    import copy

    tokenizer = copy.deepcopy(load_tokenizer("qwen3"))
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)}, replace_extra_special_tokens=False)
    return hooks.swift_make_template("checkpoint", tokenizer, build_options(ChatTemplateConfig, {"jinja": jinja}, "t"))


def text_of(template: Any, text: str, prompt: str = "", tools: Any = TOOLS) -> tuple[str, str, list[tuple[str, str]]]:
    encode = template.tokenizer
    ids = [encode(part, add_special_tokens=False)["input_ids"] for part in (prompt, text)]
    return joined(read(template, ids[0], ids[1], tools))


HERMES = "Qwen-Qwen3-0.6B"
LFM = "<|tool_call_start|>", "<|tool_call_end|>"
LISTED = '[{"name": "clock", "arguments": {"zone": "x"}}, {"name": "clock", "arguments": {"zone": "y"}}]'


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "clock", "arguments": {"zone": "x',
        '<tool_call>\n{"name": "clock", "argu',
        "<tool_call>\nnot json\n</tool_call> and more",
        'See <tool_call>\n{"nam": 1}\n</tool_call>',
        "a <tool_cal",
    ],
)
def test_a_malformed_call_comes_back_as_written(text: str) -> None:
    _, template = pair(HERMES)
    content, _, calls = text_of(template, text)
    assert content == text
    assert message_of(read(template, [], template.tokenizer(text)["input_ids"]))["content"] == text
    for _, arguments in calls:  # a begun one is never whole
        with pytest.raises(ValueError, match=r".+"):
            json.loads(arguments)


def test_what_follows_a_malformed_call_is_still_read() -> None:
    _, template = pair(HERMES)
    good = '<tool_call>\n{"name": "clock", "arguments": {"zone": "x"}}\n</tool_call>'
    content, _, calls = text_of(template, f"<tool_call>oops {good}")
    assert (content, calls) == ("<tool_call>oops", [("clock", '{"zone": "x"}')])
    content, _, calls = text_of(template, f"{good}\n<tool_call>oops")
    assert (content, calls) == ("<tool_call>oops", [("clock", '{"zone": "x"}')])


def test_a_call_that_is_cut_behind_a_whole_one_begins_once() -> None:
    _, template = pair(HERMES)
    good = '<tool_call>\n{"name": "clock", "arguments": {"zone": "x"}}\n</tool_call>'
    cut = '<tool_call>\n{"name": "clock", "arguments": {"zo'
    content, _, calls = text_of(template, f"{good}\n{cut}")
    assert content == cut
    assert calls == [("clock", '{"zone": "x"}'), ("clock", calls[1][1])]


def test_without_tools_a_call_is_content() -> None:
    _, template = pair(HERMES)
    text = '<tool_call>\n{"name": "clock", "arguments": {"zone": "x"}}\n</tool_call>'
    assert text_of(template, text + "<|im_end|>", tools=None) == (text, "", [])


def test_a_prompt_that_opens_reasoning() -> None:
    _, template = pair("deepseek-ai-DeepSeek-R1-Distill-Llama-8B")
    prompt = template.prompt([{"role": "user", "content": "?"}])
    ids = template.tokenizer("So four.\n</think>\n\nIt is 4.", add_special_tokens=False)["input_ids"]
    assert joined(read(template, prompt, ids)) == ("It is 4.", "So four.", [])
    cut = template.tokenizer("So fo", add_special_tokens=False)["input_ids"]
    assert joined(read(template, prompt, cut)) == ("", "So fo", [])


def test_arguments_stream_as_they_come() -> None:
    _, template = pair(HERMES)
    ids = template.tokenizer('<tool_call>\n{"name": "clock", "arguments": {"zone": "a long name of a zone"}}\n</tool_call>')
    reader, seen = template.reader([], TOOLS), []
    for token in ids["input_ids"]:
        seen += reader.feed([token])
    assert seen[0].name == "clock"
    assert sum(bool(delta.arguments) for delta in seen) > 5


def test_types_of_tagged_arguments_follow_the_schema() -> None:
    _, template = pair("Qwen3-Coder")
    fields = {"a": {"type": "string"}, "b": {"type": "integer"}, "c": {"type": "array"}, "d": {"type": ["string", "null"]}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": fields}}}]
    written = {"a": "5", "b": "5", "c": "['x', True]", "d": "null"}
    body = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in written.items())
    _, _, calls = text_of(template, f"<tool_call>\n<function=f>\n{body}</function>\n</tool_call>", tools=tools)
    assert json.loads(calls[0][1]) == {"a": "5", "b": 5, "c": ["x", True], "d": None}


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (LFM, LFM[0] + "[clock(zone='x'), clock(zone=\"y\")]" + LFM[1]),
        (("<|tool_call|>", "<|/tool_call|>"), f"<|tool_call|>{LISTED}<|/tool_call|>"),
        (("[TOOL_CALLS]",), f"[TOOL_CALLS] {LISTED}"),
    ],
    ids=["lfm", "phi-4-mini", "mistral"],
)  # fmt: skip
def test_templates_without_calls_follow_the_tokenizer(tokens: tuple[str, ...], text: str) -> None:
    template = opened(
        "{{ tools }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}", *tokens
    )
    content, _, calls = text_of(template, text + "<|im_end|>")
    assert (content, [(name, json.loads(arguments)) for name, arguments in calls]) == (
        "", [("clock", {"zone": "x"}), ("clock", {"zone": "y"})],
    )  # fmt: skip


def test_kimi_is_known_by_its_text() -> None:
    _, template = pair("Kimi-K2-Instruct")
    _, other = pair("moonshotai-Kimi-K2")
    assert not template.answers.learnt
    assert template.answers.calls == other.answers.calls


def test_the_grammar_goes_by_the_prompt() -> None:
    """Reasoning that the prompt opens must be ended; none stands after a block that is closed; else the model may."""
    _, template = pair(HERMES)
    question = [{"role": "user", "content": "?"}]
    opens = template.tokenizer("<think>\n")["input_ids"]
    prompts = template.prompt(question), template.prompt(question, enable_thinking=False), opens
    starts = [template.call_grammar(TOOLS, "ping", prompt=ids).partition("\n")[0] for ids in prompts]
    call = '<[151657]> "\\n" call "\\n" <[151658]> more*'
    assert starts == [f'start: (<[151667]> thought "\\n\\n")? {call}', f"start: {call}", f'start: thought "\\n\\n" {call}']


def test_grammar_refuses_what_cannot_be_called() -> None:
    _, template = pair(HERMES)
    with pytest.raises(RequestError, match="no tool is named 'x'; there are: weather, clock, ping"):
        template.call_grammar(TOOLS, "x")
    with pytest.raises(RequestError, match="there are none"):
        template.call_grammar([])
    with pytest.raises(RequestError, match=r"tools\.0: no function with a name"):
        template.call_grammar([{}])


@pytest.fixture(scope="module")
def matchers() -> Any:
    guidance = pytest.importorskip("llguidance")
    import llguidance.hf

    made: dict[int, Any] = {}

    def matcher(template: Any, **options: Any) -> Any:
        key = id(template.tokenizer)
        made[key] = made.get(key) or llguidance.hf.from_tokenizer(template.tokenizer)
        found = guidance.LLMatcher(made[key], template.call_grammar(TOOLS, **options))
        assert not found.get_error()
        return made[key], found

    return matcher


@pytest.mark.parametrize("name", CALLING)
def test_the_grammar_takes_the_templates_own_rendering(name: str, matchers: Any) -> None:
    thinks = {"content": "", "tool_calls": [WEATHER], "reasoning_content": "Look it up."}
    for message in ({"content": None, "tool_calls": [WEATHER]}, {"content": None, "tool_calls": [WEATHER, CLOCK]}, thinks):
        found = answered(name, message)
        if found is None or (name in ONE_CALL and len(message["tool_calls"]) > 1):
            continue
        template, prompt, ids = found
        told = template.tokenizer.decode([*prompt, *ids])
        if message is thinks and (name in OTHER_PROMPT or "Look it up." not in told):
            continue
        ids = trimmed(template, ids)
        _, matcher = matchers(template, prompt=prompt)
        taken = matcher.validate_tokens(ids)
        assert taken == len(ids), template.tokenizer.decode(ids[:taken]) + "|" + template.tokenizer.decode(ids[taken:])
        matcher.consume_tokens(ids)
        assert matcher.is_accepting()


def trimmed(template: Any, ids: list[int]) -> list[int]:
    """Ids without what ends the turn."""
    text = template.tokenizer.decode(ids)
    last = max(text.rfind("weather"), text.rfind("clock"))
    ends = [at for end in template.answers.ends if end != "<|call|>" and (at := text.find(end, last)) >= 0]
    return list(template.tokenizer(text[: min(ends, default=len(text))], add_special_tokens=False)["input_ids"])


CLOSERS = ('"', '"}', "}", '"]', "]", ")", '")')


def walk(vocabulary: Any, matcher: Any, template: Any, source: random.Random) -> list[int] | None:
    """A random sentence, led to an end by preferring texts that close something; None where it did not end."""
    form = template.answers
    syntax = getattr(form.calls.call, "syntax", None) if hasattr(form.calls, "call") else None
    texts = [form.closing, getattr(syntax, "closing", ""), getattr(syntax, "quote", ""), *CLOSERS]
    closers = [template.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts if text]
    ids: list[int] = []
    for step in range(120):
        if matcher.is_stopped() or (matcher.is_accepting() and source.random() < 0.5):
            return ids
        closing = [own for own in closers if matcher.validate_tokens(own) == len(own)] if source.random() < step / 15 else []
        if closing:
            chosen = closing[0] if len(closing[0]) > 1 else source.choice(closing)
        else:
            allowed = np.flatnonzero(np.frombuffer(matcher.compute_logit_bias(), dtype=np.uint8))
            chosen = [int(allowed[source.randrange(len(allowed))])]
            if chosen == [vocabulary.eos_token]:
                continue
        assert matcher.consume_tokens(chosen), template.tokenizer.decode([*ids, *chosen])
        ids += chosen
    return None


@pytest.mark.parametrize("name", [*CALLING, "Kimi-K2-Instruct"])
def test_sentences_of_the_grammar_are_calls(name: str, matchers: Any) -> None:
    """Random walks through the masks: each is read as calls of the tools, with arguments of their types."""
    _, template = pair(name)
    source = random.Random(name)
    prompt = template.prompt([{"role": "user", "content": "?"}], TOOLS)
    ended = 0
    for wanted_name in (None, "weather", "clock", "ping"):
        vocabulary, matcher = matchers(template, name=wanted_name)
        ids = walk(vocabulary, matcher, template, source)
        if ids is None:
            continue
        ended += 1
        message = message_of(read(template, prompt, ids))
        said = template.tokenizer.decode(ids)
        assert message.get("tool_calls"), said
        for called, arguments in calls_of(message):
            assert called in ({wanted_name} if wanted_name else {"weather", "clock", "ping"}), said
            if called == "weather":
                assert isinstance(arguments["city"], str), said
                assert isinstance(arguments.get("days", 0), int), said
                assert isinstance(arguments.get("hourly", True), bool), said
        assert not message["content"], said
    assert ended
