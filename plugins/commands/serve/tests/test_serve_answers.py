"""Reasoning and tool calls apart from the text, whole and streamed; what tool_choice demands; models with a head."""

from __future__ import annotations

import base64
import io
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI
from swift_core.config import load_config
from swift_core.session import Session
from swift_core.types import Completion
from swift_plugin_serve.logs import Log

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
ANSWER = ["<think>", "well now", "</think>", "So: ", '<call>weather {"place": "Rome"}', "</call>", "<call>clock {}</call>"]
ASK: dict[str, Any] = {"model": "scripted", "messages": [{"role": "user", "content": "Hi"}], "tools": [WEATHER, CLOCK]}


@pytest.fixture
def server(start: Any, scripted: Any, spoken: Any) -> Iterator[Any]:
    with start(scripted(lambda request: ANSWER), spoken, spoken.tokenizer) as found:
        yield found


@pytest.fixture
def client(server: Any) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def test_calls_and_reasoning(client: OpenAI) -> None:
    choice = client.chat.completions.create(**ASK).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "So: ")
    assert choice.message.reasoning_content == "well now"  # type: ignore[attr-defined]
    calls: Any = choice.message.tool_calls
    assert [(call.function.name, call.function.arguments) for call in calls] == [
        ("weather", '{"place": "Rome"}'),
        ("clock", "{}"),
    ]
    assert len({call.id for call in calls}) == 2


def test_calls_and_reasoning_streamed(client: OpenAI) -> None:
    parts = list(client.chat.completions.create(**ASK, stream=True, logprobs=True))
    deltas = [part.choices[0].delta for part in parts]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "well now"
    assert "".join(delta.content or "" for delta in deltas) == "So: "
    calls = [call for delta in deltas for call in delta.tool_calls or ()]
    told_calls = [(call.index, call.id is not None, call.function) for call in calls if call.function]
    assert [(index, begins, function.name, function.arguments) for index, begins, function in told_calls] == [
        (0, True, "weather", ""), (0, False, None, '{"place": "Rome"}'), (1, True, "clock", ""), (1, False, None, "{}"),
    ]  # fmt: skip
    assert parts[-1].choices[0].finish_reason == "tool_calls"
    told = [one for part in parts if part.choices[0].logprobs for one in part.choices[0].logprobs.content or ()]
    assert len(told) == len("".join(ANSWER))  # each token once, those of marks too
    assert {one.logprob for one in told} == {-0.5}


def test_one_call_where_one_is_wanted(client: OpenAI, server: Any) -> None:
    for stream in (False, True):
        found: Any = client.chat.completions.create(**ASK, parallel_tool_calls=False, stream=stream)
        if stream:
            parts = list(found)
            names = [call.function.name for part in parts for call in part.choices[0].delta.tool_calls or () if call.id]
            assert (names, parts[-1].choices[0].finish_reason) == (["weather"], "tool_calls")
        else:
            assert [call.function.name for call in found.choices[0].message.tool_calls] == ["weather"]
    server.until(lambda: server.state.admission.running == 0)


@pytest.mark.parametrize(
    ("choice", "grammar"),
    [
        ("required", "call ['weather', 'clock'] many"),
        ({"type": "function", "function": {"name": "clock"}}, "call clock one"),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [
            {"type": "function", "function": {"name": "clock"}}]}}, "call ['clock'] many"),
    ],
)  # fmt: skip
def test_a_call_can_be_demanded(server: Any, choice: Any, grammar: str) -> None:
    assert server.chat(tools=[WEATHER, CLOCK], tool_choice=choice).status_code == 200
    asked = server.engine.seen[-1]
    assert (asked.constraint.kind, asked.constraint.value) == ("grammar", grammar)
    assert asked.tools[-1] == CLOCK


def test_tool_choices_that_demand_nothing_or_too_much(server: Any) -> None:
    assert server.chat(tools=[WEATHER], tool_choice="none").json()["choices"][0]["message"]["content"].endswith("</call>")
    assert (server.engine.seen[-1].tools, server.engine.seen[-1].constraint) == (None, None)
    assert server.chat(tools=[WEATHER], tool_choice="auto").status_code == 200
    assert (server.engine.seen[-1].tools, server.engine.seen[-1].constraint) == ([WEATHER], None)
    for body, message in (
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "no tool 'x'; tools: weather"),
        ({"tools": [WEATHER, WEATHER]}, "two have the same name"),
        ({"tools": [WEATHER], "response_format": {"type": "json_object"}}, "leaves no room for a tool call"),
        ({"chat_template_kwargs": {"refuse": True}}, "the chat template refuses this"),
    ):
        answer = server.chat(**body)
        assert answer.status_code == 400
        assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_tools_that_the_chat_template_does_not_show_are_told(start: Any, scripted: Any, spoken: Any, stream: bool) -> None:
    note = "the chat template does not show tools to the model"
    with start(scripted(lambda request: ["a"]), spoken) as server:
        told = io.StringIO()
        server.state.log = Log(stream=told)
        assert "x-swift-note" not in server.chat(stream=stream).headers
        assert server.chat(tools=[WEATHER], stream=stream).headers["x-swift-note"] == note
        server.until(lambda: told.getvalue().count('"request"') == 2)
        assert [json.loads(line).get("note") for line in told.getvalue().splitlines()] == [None, note]
        response = server.client.post("/v1/responses", json={"model": "scripted", "input": "a", "tools": [
            {"type": "function", **WEATHER["function"]}]})  # fmt: skip
        assert response.headers["x-swift-note"] == note
    plain = spoken.prompt
    spoken.prompt = lambda messages, tools=None, **kwargs: plain(messages + (tools or []), **kwargs)
    with start(scripted(lambda request: ["a"]), spoken) as server:
        assert "x-swift-note" not in server.chat(tools=[WEATHER], stream=stream).headers


def test_a_stop_string_never_shows(start: Any, scripted: Any, spoken: Any) -> None:
    with start(scripted(lambda request: ["one E", "N", "D"]), spoken) as server:
        assert server.chat(stop="END").json()["choices"][0]["message"]["content"] == "one "
        text = server.chat(stop="END", stream=True).text
        assert '"content":"E"' not in text
    with start(scripted(lambda request: ["one E", "N", "d"]), spoken) as server:
        assert server.chat(stop="END").json()["choices"][0]["message"]["content"] == "one ENd"


def test_responses_tell_of_calls(client: OpenAI, server: Any) -> None:
    tools: Any = [
        {"type": "function", "name": "weather", "parameters": {"type": "object"}},
        {"type": "function", "name": "clock"},
    ]
    ask: dict[str, Any] = {"model": "scripted", "input": "Hi", "tools": tools}
    whole: Any = client.responses.create(**ask)
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call", "function_call"]
    assert (whole.output_text, whole.output[0].content[0].text) == ("So: ", "well now")
    assert (whole.output[2].name, whole.output[2].arguments) == ("weather", '{"place": "Rome"}')
    events: Any = list(client.responses.create(**ask, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert [(event.output_index, event.arguments) for event in done] == [(2, '{"place": "Rome"}'), (3, "{}")]
    deltas = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
    assert "".join(deltas) == "well now"
    assert [item.type for item in events[-1].response.output] == [item.type for item in whole.output]
    output: Any = [{"type": "function_call_output", "call_id": whole.output[2].call_id, "output": "sunny"}]
    client.responses.create(**(ask | {"input": output}), previous_response_id=whole.id)
    said = server.engine.seen[-1].messages
    assert [message["role"] for message in said] == ["user", "assistant", "tool"]
    assert said[1]["tool_calls"][0]["id"] == said[2]["tool_call_id"]
    assert said[1]["reasoning_content"] == "well now"


def test_responses_kept_are_bounded(start: Any, scripted: Any) -> None:
    with start(scripted(lambda request: ["a"]), stored=3) as server:
        made = [server.client.post("/v1/responses", json={"model": "scripted", "input": "Hi"}).json()["id"] for _ in range(5)]
        assert [server.client.get(f"/v1/responses/{one}").status_code for one in made] == [404, 404, 200, 200, 200]
    with start(scripted(lambda request: ["a" * 50]), stored_bytes=4000) as server:
        for _ in range(20):
            server.client.post("/v1/responses", json={"model": "scripted", "input": "x" * 300})
        assert 0 < server.state.store.used <= 4000


def test_completions_choose_the_best(start: Any, scripted: Any, spoken: Any) -> None:
    with start(scripted(lambda request: ["ab"]), spoken, spoken.tokenizer) as server:
        body = {"model": "scripted", "prompt": ["x", "y"], "n": 1, "best_of": 2, "max_tokens": 5}
        found = server.client.post("/v1/completions", json=body).json()
        assert [choice["index"] for choice in found["choices"]] == [0, 1]
        assert found["usage"]["completion_tokens"] == 8  # all that was made
        body = {"model": "scripted", "prompt": "xyz", "max_tokens": 0, "echo": True, "logprobs": 0}
        scored = server.client.post("/v1/completions", json=body).json()["choices"][0]
        assert (scored["text"], scored["logprobs"]["token_logprobs"]) == ("xyz", [None, -0.25, -0.25])


class Mute:
    """An engine that tells no log-probabilities."""

    capabilities = frozenset({"stream", "concurrent"})

    def generate(self, requests: Any, stream: bool = False) -> Any:
        yield Completion(0, "ab", [100, 101], [], "stop", 3)


def test_log_probabilities_that_the_engine_has_not_are_told(start: Any, spoken: Any) -> None:
    with start(Mute(), spoken, spoken.tokenizer) as server:
        assert server.chat().status_code == 200
        talk = {"model": "scripted", "messages": [{"role": "user", "content": "Hi"}], "logprobs": True}
        plain = {"model": "scripted", "prompt": "a", "logprobs": 0}
        given = {"model": "scripted", "input": "a", "include": ["message.output_text.logprobs"]}
        for path, body in (("chat/completions", talk), ("completions", plain), ("responses", given)):
            for stream in (False, True):
                found = server.client.post(f"/v1/{path}", json={**body, "stream": stream})
                assert (found.status_code, found.json()["error"]["param"]) == (400, "logprobs")


# --- models with a head -----------------------------------------------------------------------------------------------


def opened(folder: Path, task: str, template: str) -> Any:
    config = load_config([], [f"model.task={task}", f"template={template}"], {"model": str(folder)})
    return Session(config)


def test_embeddings_are_the_engines(start: Any, tiny_folder: Path) -> None:
    with opened(tiny_folder, "embedding", "embed") as session:
        found = session.opened()
        with start(found.engine, found.template, session.processor(found.ref), found.ref) as server:
            client = OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
            made = client.embeddings.create(model="scripted", input=["One two", "Three"], encoding_format="float")
            template: Any = found.template
            rows = [
                template.sample({"messages": [{"role": "user", "content": text}]}, labelled=False)
                for text in ("One two", "Three")
            ]
            wanted = found.engine.embed([row.input_ids for row in rows])
            assert [one.embedding for one in made.data] == [pytest.approx(vector, abs=1e-6) for vector in wanted]
            assert made.usage.prompt_tokens == sum(len(row.input_ids) for row in rows)
            coded = client.embeddings.create(model="scripted", input="One two")  # the client asks for base64 by itself
            assert coded.data[0].embedding == pytest.approx(wanted[0], abs=1e-6)
            raw = httpx.post(f"{server.url}/v1/embeddings", json={"model": "scripted", "input": "One two", "dimensions": 4,
                                                                  "encoding_format": "base64"}).json()  # fmt: skip
            short = struct.unpack("<4f", base64.b64decode(raw["data"][0]["embedding"]))
            norm = sum(value * value for value in wanted[0][:4]) ** 0.5
            assert short == pytest.approx([value / norm for value in wanted[0][:4]], abs=1e-6)
            ids = client.embeddings.create(model="scripted", input=rows[1].input_ids, encoding_format="float")
            assert ids.data[0].embedding == pytest.approx(wanted[1], abs=1e-6)
            refused = server.chat()
            assert refused.status_code == 400
            assert "does not generate text" in refused.json()["error"]["message"]
            assert server.client.post("/v1/embeddings", json={"model": "scripted", "input": ""}).status_code in (200, 400)


def test_rerank_orders_as_the_engine_scores(start: Any, tiny_folder: Path) -> None:
    documents = ["tea in the tin", "jam", "a long text about nothing at all"]
    with opened(tiny_folder, "reranker", "rerank") as session:
        found = session.opened()
        with start(found.engine, found.template, session.processor(found.ref), found.ref) as server:
            body = {"model": "scripted", "query": "tea?", "documents": [*documents[:2], {"text": documents[2]}],
                    "return_documents": True}  # fmt: skip
            answer = server.client.post("/v1/rerank", json=body).json()
            template: Any = found.template
            engine: Any = found.engine
            row = {"messages": [{"role": "user", "content": "tea?"}], "documents": documents}
            scores = engine.predict([template.sample(row, labelled=False)])[0]["scores"]
            order = sorted(range(3), key=lambda n: -scores[n])
            assert [one["index"] for one in answer["results"]] == order
            assert [one["document"]["text"] for one in answer["results"]] == [documents[n] for n in order]
            import math

            wanted = [1 / (1 + math.exp(-scores[n])) for n in order]
            assert [one["relevance_score"] for one in answer["results"]] == pytest.approx(wanted, abs=1e-6)
            top = server.client.post("/v1/rerank", json=body | {"top_n": 1, "return_documents": False}).json()
            assert [set(one) for one in top["results"]] == [{"index", "relevance_score"}]
            assert json.dumps(top)


def test_what_has_no_head_says_so(start: Any, scripted: Any) -> None:
    with start(scripted(lambda request: ["a"])) as server:
        answer = server.client.post("/v1/rerank", json={"model": "scripted", "query": "a", "documents": ["b"]})
        assert answer.status_code == 400
        assert "rerank needs a model that scores pairs" in answer.json()["error"]["message"]
