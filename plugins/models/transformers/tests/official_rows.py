"""Rows of every shape that the official templates are tried on, and a seeded maker of random ones."""

from __future__ import annotations

import random
from typing import Any

Row = dict[str, Any]


def user(content: Any) -> Row:
    return {"role": "user", "content": content}


def says(content: Any, **more: Any) -> Row:
    return {"role": "assistant", "content": content, **more}


def system(content: str) -> Row:
    return {"role": "system", "content": content}


def call(number: int, name: str, **arguments: Any) -> Row:
    return {"id": f"call{number:05d}", "type": "function", "function": {"name": name, "arguments": arguments}}


def result(number: int, name: str, content: str) -> Row:
    return {"role": "tool", "tool_call_id": f"call{number:05d}", "name": name, "content": content}


def tool(name: str, **properties: str) -> Row:
    fields = {key: {"type": kind, "description": f"the {key}"} for key, kind in properties.items()}
    parameters = {"type": "object", "properties": fields, "required": list(fields)[:1]}
    return {"type": "function", "function": {"name": name, "description": f"Looks up {name}.", "parameters": parameters}}


TOOLS = [tool("weather", city="string", days="integer"), tool("clock", zone="string")]
ASK, WEATHER = user("Is it fine in Köln?"), call(1, "weather", city="Köln", days=3)
CLOCK = call(2, "clock", zone="Europe/Berlin")
FINE, LATE = result(1, "weather", "sunny, 21°"), result(2, "clock", "23:59")
HELLO, HI = user("Hello, who is there?"), says("It is me, the fox.")
MARKUP = (
    "<|im_end|>", "<|im_start|>assistant\n", "<|eot_id|>", "<|end|>", "<｜end▁of▁sentence｜>", "[/INST]",
    "<end_of_turn>", "<|user|>",
)  # fmt: skip


def _plain() -> dict[str, list[Row]]:
    longest = says("First line.\n\n  - indented\n\n```py\nif x:\n    y = 1\n```\nLast line.")
    return {
        "one": [HELLO, HI],
        "two": [HELLO, HI, user("And now?"), says("Still me.")],
        "four": [HELLO, HI, user("And?"), says("Still."), user("Sure?"), says("Yes."), user("Bye."), says("Bye.")],
        "system": [system("You are terse."), HELLO, HI],
        "system-two": [system("You are terse."), HELLO, HI, user("And now?"), says("Still me.")],
        "late-system": [HELLO, HI, system("Be louder."), user("And now?"), says("STILL ME.")],
        "same-words": [user("Yes."), says("Yes."), user("Yes."), says("Yes."), user("Yes."), says("Yes.")],
        "words-of-the-header": [user("assistant"), says("assistant\nuser"), user("model"), says("model")],
        "long": [HELLO, longest, user("Thanks."), says("Welcome.")],
        "blank-edges": [user(" \n Hm? \n"), says("\n\n  Well, well. \n\n"), user("\t?"), says("  yes ")],
        "empty": [HELLO, says("")],
        "empty-first": [HELLO, says(""), user("Hello?"), says("Here.")],
        "blank": [HELLO, says(" \n "), user("Hello?"), says("Here.")],
        "empty-user": [user(""), says("You said nothing.")],
        "one-letter": [user("a"), says("a"), user("b"), says("a")],
        "unicode": [user("🦊🇩🇪 日本語 ça va?"), says("👩‍👩‍👧 ﬁne, مرحبا e\u0301 \u200b!"), user("🦊"), says("🦊")],
        "starts-like-a-thought": [user("Bold?"), says("<b>Bold</b> <"), user("More?"), says("<thing> [x]")],
        "braces": [user("{{ messages }} {% if %}"), says("{{ bos_token }} {# no #} {%- set x = 1 %}"), user("?"), says("{")],
        "repeats": [user("na na"), says("na na na na"), user("na na na na"), says("na na")],
        "untrained-first": [HELLO, says("Wrong.", train=False), user("No."), says("Right.")],
        "untrained-last": [HELLO, says("Right."), user("No."), says("Wrong.", train=False)],
        "weights": [HELLO, says("Half.", weight=0.5), user("No."), says("None of it", weight=0), user("?"), says("Whole.")],
        "parts": [user([{"type": "text", "text": "Two "}, {"type": "text", "text": "parts?"}]), HI],
        "answer-parts": [HELLO, says([{"type": "text", "text": "In parts."}]), user("?"), HI],
        "image-part": [user([{"type": "image", "image": "fox.png"}, {"type": "text", "text": "What is it?"}]), says("A fox.")],
        "no-answer": [HELLO],
        "answer-first": [HI, HELLO, says("Still me.")],
        "users-in-a-row": [HELLO, user("Hello?"), HI],
        "answers-in-a-row": [HELLO, HI, says("And nobody else."), user("Bye."), says("Bye.")],
    }


def _thinking() -> dict[str, list[Row]]:
    aloud, silent = says("It is 4.", reasoning_content="Two and two.\nSo four."), says("It is 9.")
    inline = says("<think>\nTwo and two.\n</think>\n\nIt is 4.")
    return {
        "thinks": [user("2+2?"), aloud],
        "thinks-twice": [user("2+2?"), aloud, user("2+3?"), says("It is 5.", reasoning_content="One more than 4.")],
        "thinks-first": [user("2+2?"), aloud, user("3*3?"), silent],
        "thinks-last": [user("3*3?"), silent, user("2+2?"), aloud],
        "thinks-inline": [user("2+2?"), inline],
        "thinks-inline-first": [user("2+2?"), inline, user("3*3?"), silent],
        "thinks-long": [user("?"), says("4.", reasoning_content="Hm. " * 30), user("Yes?"), says("4.")],
        "thinks-alone": [user("2+2?"), says("", reasoning_content="No idea.")],
    }


def _calls() -> dict[str, list[Row]]:
    nested = call(3, "weather", city="Łódź \"x\" 'y'", days=7, where={"deep": [1, 2.5, True, None, "ß"]}, tags=["a", "b"])
    first = says(None, tool_calls=[WEATHER])
    return {
        "call-last": [ASK, first],
        "call-answer": [ASK, first, FINE, says("Sunny.")],
        "call-empty-content": [ASK, says("", tool_calls=[WEATHER]), FINE, says("Sunny.")],
        "call-with-content": [ASK, says("Let me look.", tool_calls=[WEATHER]), FINE, says("Sunny.")],
        "call-then-user": [ASK, first, FINE, says("Sunny."), user("And the time?"), says("Ask a clock.")],
        "calls-in-turn": [ASK, first, FINE, says(None, tool_calls=[CLOCK]), LATE, says("Sunny, and late.")],
        "calls-two-rounds": [
            ASK, first, FINE, says("Sunny."), user("And the time?"), says(None, tool_calls=[CLOCK]), LATE, says("Late."),
        ],
        "calls-parallel": [ASK, says(None, tool_calls=[WEATHER, CLOCK]), FINE, LATE, says("Both.")],
        "calls-parallel-last": [ASK, says(None, tool_calls=[WEATHER, CLOCK])],
        "call-nested": [ASK, says(None, tool_calls=[nested]), result(3, "weather", '{"t": 3}'), says("Cold.")],
        "call-no-arguments": [ASK, says(None, tool_calls=[call(4, "clock")]), result(4, "clock", "noon"), says("Noon.")],
        "call-untrained": [ASK, {**first, "train": False}, FINE, says("Sunny.")],
        "call-weight": [ASK, {**first, "weight": 2.5}, FINE, says("Sunny.", weight=0.5)],
        "call-system": [system("You may call."), ASK, first, FINE, says("Sunny.")],
        "call-thinks": [
            ASK, {**first, "reasoning_content": "I must look."}, FINE, says("Sunny.", reasoning_content="It shines."),
        ],
        "call-echo": [user("weather"), first, result(1, "weather", "weather Köln"), says("weather Köln")],
        "tools-unused": [ASK, says("I cannot say.")],
    }  # fmt: skip


def shapes() -> dict[str, Row]:
    """All named rows."""
    found: dict[str, Row] = {}
    for name, messages in _plain().items():
        found[name] = {"messages": messages}
    for index, text in enumerate(MARKUP):
        found[f"markup-{index}"] = {"messages": [user(f"a{text}b"), says(f"x {text} y"), user(text), says(f"Say {text}?")]}
    for name, messages in _thinking().items():
        found[name] = {"messages": messages}
    for name, messages in _calls().items():
        found[name] = {"messages": messages, "tools": TOOLS}
    for flag in (True, False):
        switch = {"enable_thinking": flag}
        found[f"switch-{flag}"] = {"messages": [HELLO, HI, user("?"), says("Still.")], "chat_template_kwargs": switch}
    thinks = [user("2+2?"), says("It is 4.", reasoning_content="Two and two.")]
    found["switch-True-thinks"] = {"messages": thinks, "chat_template_kwargs": {"enable_thinking": True}}
    return found


NASTY = (
    "", " ", "\n", "a", "Yes.", "Yes. ", " Yes.", "yes\n\n\n", "\tx", "0", "None", "null", "🦊", " 🦊🦊", "e\u0301", "日本",
    "مرحبا", "<", "<think", "<|", "|>", "[", "[INST", "</", "<b>", "user", "assistant", "model\n", "{", "}}", "{{ x }}", "\\n",
    "\\", '"', "'", "a" * 200, "1,234,567.89", "x  y", "  ", "\u00a0", "\u200b", "ﬁ", "İ", "\r\n", "--", "###",
    "* a\n* b", "`x`", "$\\frac{1}{2}$", "<|im_end|>", "<|eot_id|>\n", "[/INST]", "</tool_call>", "<|end|>", "<think>",
)  # fmt: skip


def random_rows(seed: int, count: int) -> list[Row]:
    """Random conversations of nasty strings, with systems, tools, calls, thoughts and weights. The seed fixes them."""
    source = random.Random(seed)
    return [_random_row(source) for _ in range(count)]


def _random_row(source: random.Random) -> Row:
    def text(least: int = 0) -> str:
        return "".join(source.choice(NASTY) for _ in range(source.randint(least, 4)))

    tools = source.random() < 0.4
    thinks = source.random() < 0.25
    messages: list[Row] = [system(text(1))] if source.random() < 0.3 else []
    for _ in range(source.randint(1, 4)):
        messages.append(user(text()))
        if tools and source.random() < 0.6:
            number = len(messages)
            calls = [call(number, "weather", city=text(1), days=source.randint(-3, 9))]
            if source.random() < 0.25:
                calls.append(call(number + 50, "clock", zone=text(1)))
            messages.append(says(source.choice([None, "", text(1)]), tool_calls=calls))
            messages += [result(int(each["id"][4:]), each["function"]["name"], text()) for each in calls]
        messages.append(says(text(1)))
        if thinks and source.random() < 0.7:
            messages[-1]["reasoning_content"] = "I think: " + text(1)
        if source.random() < 0.1:
            messages[-1]["train"] = False
        if source.random() < 0.1:
            messages[-1]["weight"] = 0.25
    return {"messages": messages, "tools": TOOLS} if tools else {"messages": messages}
