"""Row shapes: what each becomes, and the exact reason why a row is refused. Rows of the fixtures are checked by value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from swift_plugin_huggingface.config import HuggingFaceConfig
from swift_plugin_huggingface.dataset import open_dataset
from swift_plugin_huggingface.rows import standard_row

FIXTURES = Path(__file__).parents[5] / "shared" / "fixtures" / "datasets"


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


QA = [user("q"), answer("a")]
PART = {"type": "text", "text": "hi"}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": QA}, QA),
        ({"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'}, QA),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, QA),
        ({"conversation": [{"human": "q", "assistant": "a"}]}, QA),
        ({"system": "s", "conversations": [{"from": "human", "value": "q"}]}, [system("s"), user("q")]),
        ({"conversations": [{"from": "system", "value": "s"}, {"from": "user", "value": "q"}]}, [system("s"), user("q")]),
        ({"instruction": "q", "input": "", "output": "a"}, QA),
        ({"instruction": "do", "input": "this", "output": "a"}, [user("do\nthis"), answer("a")]),
        ({"instruction": "do", "context": "this", "response": "a"}, [user("do\nthis"), answer("a")]),
        ({"instruction": "q", "input": None, "output": "a", "system": "s", "history": [["x", "y"]]},
         [system("s"), user("x"), answer("y"), *QA]),
        ({"query": "q", "response": "a", "history": [["x", "y"], ["v", "w"]], "system": ""},
         [user("x"), answer("y"), user("v"), answer("w"), *QA]),
        ({"query": "q", "response": "a", "history": "[]"}, QA),
        ({"prompt": "q", "completion": "a"}, QA),
        ({"prompt": [system("s"), user("q")], "completion": [answer("a")]}, [system("s"), *QA]),
        ({"question": "q", "answer": "a"}, QA),
        ({"question": "q", "response": "a"}, QA),
        ({"input": "q", "output": "a"}, QA),
        ({"prompt": "q"}, [user("q")]),
        ({"text": "A document."}, [answer("A document.")]),
    ],
)  # fmt: skip
def test_shapes(row: dict[str, Any], messages: list[Any]) -> None:
    assert standard_row(row) == {"messages": messages}


def test_openai_messages_are_kept() -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", **call("add", x=1)}]}
    result = {"role": "tool", "content": "2", "tool_call_id": "1", "name": "add"}
    thought = {"role": "assistant", "content": "2", "reasoning_content": "easy"}
    messages = [user([PART, {"type": "image"}]), called, result, thought]
    assert standard_row({"messages": messages, "images": ["a.jpg"]})["messages"] == messages


def test_tool_calls_are_parsed() -> None:
    flat = {"id": "7", "name": "add", "arguments": '{"x": 1}'}
    nested = {"id": "8", "type": "function", "function": {"name": "add", "arguments": '{"y": [2]}'}}
    empty = {"function": {"name": "now", "arguments": ""}}
    row = standard_row({"messages": [user("q"), {"role": "assistant", "tool_calls": [flat, nested, empty]}]})
    assert row["messages"][1] == {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "7", **call("add", x=1)}, {"id": "8", **call("add", y=[2])}, call("now")],
    }


def test_calls_of_their_own_join_the_turn_before() -> None:
    add, now = '{"name": "add", "arguments": {"x": 1}}', '{"name": "now", "arguments": "{}"}'
    row = standard_row(
        {
            "messages": [
                user("q"), answer("Let me see."), {"role": "tool_call", "content": add}, {"role": "tool_call", "content": now},
                {"role": "tool_response", "content": "1"}, {"role": "tool_response", "content": "2"}, answer("a"),
            ]
        }
    )  # fmt: skip
    spoken = {"role": "assistant", "content": "Let me see.", "tool_calls": [call("add", x=1), call("now")]}
    results = [{"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]
    assert row["messages"] == [user("q"), spoken, *results, answer("a")]
    legacy = {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"x": 1}'}}
    assert standard_row({"messages": [legacy]})["messages"][0]["tool_calls"] == [call("add", x=1)]
    untrained = [user("q"), {**answer("No."), "train": False}, {"role": "tool_call", "content": add}]
    assert [message["role"] for message in standard_row({"messages": untrained})["messages"]] == [
        "user",
        "assistant",
        "assistant",
    ]


def test_tools_take_the_openai_form() -> None:
    function = {"name": "add", "parameters": {"type": "object"}}
    wrapped = {"type": "function", "function": function}
    text = '[{"name": "add", "parameters": {"type": "object"}}]'
    for tools in (text, [function], [wrapped], [text[1:-1]], [{"type": "function", **function}], {"function": function}):
        assert standard_row({"messages": QA, "tools": tools})["tools"] == [wrapped]
    for tools in ("", "[]", [], None):
        assert "tools" not in standard_row({"messages": QA, "tools": tools})


def test_flags_and_columns_are_kept() -> None:
    row = standard_row(
        {
            "messages": [user("q"), {**answer("a"), "loss": False}, {**answer("b"), "loss_scale": 0.5, "train": True}],
            "label": False, "solution": "42", "difficulty": 3, "chat_template_kwargs": '{"enable_thinking": false}',
            "objects": '{"bbox": [[1, 2, 3, 4]]}', "image": "", "videos": [],
        }
    )  # fmt: skip
    assert row["messages"][1] == {**answer("a"), "train": False}
    assert row["messages"][2] == {**answer("b"), "weight": 0.5, "train": True}
    assert {key: row[key] for key in row if key != "messages"} == {
        "label": False, "solution": "42", "difficulty": 3, "chat_template_kwargs": {"enable_thinking": False},
        "objects": {"bbox": [[1, 2, 3, 4]]},
    }  # fmt: skip
    assert standard_row({"problem": "q", "solution": "a"}) == {"messages": QA, "solution": "a"}
    assert standard_row({"question": "q", "answer": "a", "solution": "42"}) == {"messages": QA, "solution": "42"}


TOOL_TURN = [{"role": "assistant", "content": "", "tool_calls": [call("f")]}, {"role": "tool", "content": "1"}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": QA, "rejected": [user("q"), answer("b")]},
        {"chosen": QA, "rejected": [user("q"), answer("b")]},
        {"messages": QA, "chosen": QA, "rejected": [user("q"), answer("b")]},
        {"messages": QA, "rejected_response": "b"},
        {"messages": QA, "rejected_messages": [user("q"), answer("b")]},
        {"messages": QA, "rejected": [answer("b")]},
        {"messages": QA, "rejected": [user("q"), answer("b")]},
        {"query": "q", "response": "a", "rejected_response": "b"},
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"},
         "rejected": {"from": "gpt", "value": "b"}},
    ],
)  # fmt: skip
def test_preference(row: dict[str, Any]) -> None:
    expected = {"messages": QA, "rejected": [user("q"), answer("b")]}
    assert standard_row(row) == expected
    assert standard_row(row, "preference") == expected


def test_rejected_answers_of_several_messages() -> None:
    turn = [user("q"), *TOOL_TURN, answer("a")]
    assert standard_row({"messages": turn, "rejected_response": "b"})["rejected"] == [user("q"), *TOOL_TURN, answer("b")]
    other = [*TOOL_TURN, answer("b")]
    assert standard_row({"messages": turn, "rejected_response": other})["rejected"] == [user("q"), *other]
    row = standard_row({"prompt": "q", "chosen": turn[1:], "rejected": "b", "system": "s"})
    assert row == {"messages": [system("s"), *turn], "rejected": [system("s"), user("q"), answer("b")]}


def test_system_option_fills_gaps_only() -> None:
    assert standard_row({"query": "q", "response": "a"}, system="s")["messages"] == [system("s"), *QA]
    assert standard_row({"query": "q", "response": "a", "system": "own"}, system="s")["messages"] == [system("own"), *QA]
    assert standard_row({"messages": [system("own"), *QA]}, system="s")["messages"] == [system("own"), *QA]
    assert standard_row({"messages": [system("own"), *QA], "system": ""}, system="s")["messages"] == [system("own"), *QA]


def test_forced_format() -> None:
    row = {"messages": [user("x")], "question": "q", "answer": "a", "text": "t", "prompt": "p"}
    assert standard_row(row)["messages"] == [user("x")]
    assert standard_row({key: row[key] for key in ("question", "answer", "prompt")}, "question") == {
        "messages": QA,
        "prompt": "p",
    }
    assert standard_row(row, "text")["messages"] == [answer("t")]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"a": 1, "b": 2}, "unrecognised row; keys found: a, b. Known shapes: messages"),
    ({"a": 1}, "dataset.columns.KEY=query"),
    ({}, "keys found: none"),
    ({"messages": {"role": "user"}}, "messages must be a list of messages, not an object"),
    ({"messages": []}, "messages is empty"),
    ({"messages": ["hi"]}, "messages[0] must be an object with a role and content, not text"),
    ({"messages": [user("q"), {"role": "assistent", "content": "a"}]}, "messages[1]: unknown role 'assistent'"),
    ({"messages": [{"role": 3, "content": "a"}]}, "messages[0]: unknown role 3"),
    ({"messages": [{"content": "a"}]}, "messages[0]: no 'role' (or 'from'); keys found: content"),
    ({"messages": [user("q"), answer(4)]}, "messages[1].content must be text or a list of parts, not a number"),
    ({"messages": [user(None)]}, "messages[0].content must be text or a list of parts, not null"),
    ({"messages": [answer(None)]}, "messages[0].content must be text or a list of parts, not null"),
    ({"messages": [user([])]}, "messages[0].content must be text or a list of parts, not an empty list"),
    ({"messages": [user(["hi"])]}, "messages[0].content[0] must be an object with a 'type'"),
    ({"messages": [user([{"type": "text"}])]}, "messages[0].content[0]: a text part needs 'text'"),
    ({"messages": [{**answer("a"), "train": 1}]}, "messages[0].train must be true or false, not a number"),
    ({"messages": [{**answer("a"), "loss": "yes"}]}, "messages[0].loss must be true or false, not text"),
    ({"messages": [{**answer("a"), "weight": -1}]}, "messages[0].weight must be 0 or more, not -1"),
    ({"messages": [{**answer("a"), "loss_scale": True}]}, "messages[0].loss_scale must be a number, not true or false"),
    ({"messages": [{**answer("a"), "loss": True, "train": True}]}, "messages[0]: 'loss' and 'train' mean the same"),
    ({"messages": [{**answer(""), "tool_calls": [{"arguments": {}}]}]}, "messages[0].tool_calls[0]: no 'name'"),
    ({"messages": [{**answer(""), "tool_calls": [{"function": {"name": "f", "arguments": "x = 1"}}]}]},
     "messages[0].tool_calls[0].arguments must be an object, or the JSON text of one, not 'x = 1'"),
    ({"messages": [{**user("q"), "tool_calls": [call("f")]}]}, "messages[0]: tool_calls belong to an assistant message"),
    ({"conversations": [{"from": "function_call", "value": "f(1)"}]}, "conversations[0].value must be a tool call"),
    ({"messages": QA, "tools": "search"}, "tools must be a list of tools, or the JSON text of one, not 'search'"),
    ({"messages": QA, "tools": [{"description": "d"}]}, "tools[0]: a function needs a 'name'"),
    ({"query": "q", "response": 4}, "response must be text or messages, not a number"),
    ({"query": "q", "response": "a", "history": [["x"]]}, "history[0] must be a pair [question, answer]"),
    ({"query": "q", "response": "a", "system": 1}, "system must be text, not a number"),
    ({"messages": [system("s"), *QA], "system": "other"}, "'system' and the first message are two different system messages"),
    ({"prompt": "q", "question": "r"}, "'prompt' and 'question' could both be the question; choose with dataset.format"),
    ({"prompt": "q", "response": "a", "output": "b"}, "'response' and 'output' could both be the answer"),
    ({"messages": QA, "chosen": "c", "rejected": "b"}, "the conversation ends with an answer already"),
    ({"prompt": "q", "chosen": [user("x"), answer("a")], "rejected": "b"}, "'chosen' is a whole conversation, and begins"),
    ({"messages": QA, "rejected": [user("x"), answer("b")]}, "'rejected' is a whole conversation, and begins otherwise"),
    ({"messages": QA, "rejected": "b", "rejected_response": "c"}, "'rejected' and 'rejected_response' both hold"),
    ({"messages": QA, "chat_template_kwargs": "on"}, "chat_template_kwargs must be an object, not text"),
    ({"text": ["a"]}, "text must be text, not a list"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "reason"), REFUSED, ids=[reason[:50] for _, reason in REFUSED])
def test_refused_with_the_reason(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        standard_row(row)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_forced_format_names_what_is_missing() -> None:
    with pytest.raises(ValueError, match="not a row of format alpaca: no 'instruction'; keys found: query, response"):
        standard_row({"query": "q", "response": "a"}, "alpaca")
    with pytest.raises(ValueError, match="not a row of format preference: no 'rejected'"):
        standard_row({"query": "q", "response": "a"}, "preference")


COUNTS = {
    "alpaca_en_demo.json": 999, "c4_demo.jsonl": 300, "dpo_en_demo.json": 300, "glaive_toolcall_en_demo.json": 300,
    "gsm8k_train_2000.jsonl": 2000, "identity.json": 91, "kto_en_demo.json": 300, "mllm_demo.json": 6,
}  # fmt: skip


@pytest.fixture(params=sorted(COUNTS))
def fixture(request: pytest.FixtureRequest) -> tuple[str, list[Any]]:
    if not FIXTURES.is_dir():
        pytest.skip("the shared fixtures are not here")
    return request.param, list(open_dataset(HuggingFaceConfig(path=str(FIXTURES / request.param))))


def test_fixtures(fixture: tuple[str, list[Any]]) -> None:
    name, records = fixture
    assert len(records) == COUNTS[name]
    assert [record.where for record in records if record.refused] == []
    rows = [record.row for record in records]
    if name != "mllm_demo.json":
        assert all(isinstance(message["content"], str) for row in rows for message in row["messages"])
    globals()[f"check_{name.partition('_')[0].partition('.')[0]}"](rows)


def check_alpaca(rows: list[Any]) -> None:
    assert rows[0]["messages"][0] == user("Describe a process of making crepes.")
    assert sum("\n" in row["messages"][0]["content"] for row in rows) > 100


def check_c4(rows: list[Any]) -> None:
    assert {len(row["messages"]) for row in rows} == {1}
    assert rows[0]["messages"][0]["content"].startswith("Don’t think you need all the bells")


def check_dpo(rows: list[Any]) -> None:
    for row in rows:
        assert row["rejected"][:-1] == row["messages"][:-1]
        assert row["rejected"][-1]["role"] == row["messages"][-1]["role"] == "assistant"
    assert rows[0]["messages"][-1]["content"].startswith("That sounds like a fun and engaging idea!")


def check_glaive(rows: list[Any]) -> None:
    search = call("search_recipes", ingredients=["chicken", "bell peppers", "rice"])
    assert rows[0]["messages"][3] == {**answer(""), "tool_calls": [search]}
    assert rows[0]["tools"][0]["function"]["name"] == "search_recipes"
    assert sum("tools" in row for row in rows) == 191
    assert sum(len(message.get("tool_calls", ())) for row in rows for message in row["messages"]) == 211


def check_gsm8k(rows: list[Any]) -> None:
    assert rows[0]["messages"][1]["content"].endswith("#### 72")


def check_identity(rows: list[Any]) -> None:
    assert rows[0]["messages"][0] == user("hi")


def check_kto(rows: list[Any]) -> None:
    assert {row["label"] for row in rows} == {True, False}


def check_mllm(rows: list[Any]) -> None:
    assert all(Path(image).is_file() for row in rows for image in row["images"])
    assert [part["type"] for part in rows[0]["messages"][0]["content"]] == ["image", "text"]
    assert rows[0]["messages"][2]["content"] == [{"type": "text", "text": "What are they doing?"}, {"type": "image"}]
    assert [Path(image).name for image in rows[0]["images"]] == ["1.jpg", "1.jpg"]
