"""What a server refuses, bounds and survives: keys, sizes, floods, slow engines, clients that go away, engines that fail."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from swift_core.session import Opened
from swift_plugin_serve.served import Served
from swift_plugin_serve.settings import Settings

HELLO = ["Hel", "lo"]


def events(response: httpx.Response) -> list[Any]:
    lines = [line[6:] for line in response.text.split("\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_answers_whole_and_streamed(start: Any, scripted: Any) -> None:
    with start(scripted(lambda request: HELLO)) as server:
        whole = server.chat().json()
        assert whole["choices"] == [
            {"index": 0, "message": {"role": "assistant", "content": "Hello", "refusal": None}, "logprobs": None,
             "finish_reason": "stop"}
        ]  # fmt: skip
        assert whole["usage"] == {
            "prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12, "prompt_tokens_details": {"cached_tokens": 3},
            "completion_tokens_details": {"accepted_prediction_tokens": 2, "rejected_prediction_tokens": 2},
        }  # fmt: skip
        parts = events(server.chat(stream=True, stream_options={"include_usage": True}))
        assert "".join(part["choices"][0]["delta"].get("content", "") for part in parts[:-1]) == "Hello"
        assert [part["choices"][0]["finish_reason"] for part in parts[:-1]] == [None, None, None, "stop"]
        assert (parts[-1]["choices"], parts[-1]["usage"]) == ([], whole["usage"])
        assert all(part["usage"] is None for part in parts[:-1])
        told = httpx.get(f"{server.url}/metrics").text
        assert 'swift_drafted_tokens_total{model="' in told
        assert [line.split()[-1] for line in told.splitlines() if line.startswith("swift_accepted_tokens_total")] == ["4.0"]


def test_defaults_are_those_of_openai_and_options_arrive(start: Any, scripted: Any) -> None:
    engine = scripted(lambda request: HELLO)
    with start(engine) as server:
        server.chat()
        asked = engine.seen[-1]
        assert (asked.temperature, asked.top_p, asked.top_k, asked.n, asked.seed) == (1.0, 1.0, 0, 1, None)
        server.chat(
            temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=0.4,
            logit_bias={"7": -100}, seed=11, stop=["x", "y"], n=3, max_completion_tokens=9, min_tokens=2, ignore_eos=True,
            stop_token_ids=[4], chat_template_kwargs={"deep": True},
        )  # fmt: skip
        asked = engine.seen[-1]
        found = {name: getattr(asked, name) for name in (
            "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty",
            "logit_bias", "seed", "stop", "n", "max_tokens", "min_tokens", "ignore_eos", "stop_ids", "template_kwargs",
        )}  # fmt: skip
        assert found == {
            "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "frequency_penalty": 0.3,
            "presence_penalty": 0.4, "logit_bias": {7: -100.0}, "seed": 11, "stop": ["x", "y"], "n": 3, "max_tokens": 9,
            "min_tokens": 2, "ignore_eos": True, "stop_ids": [4], "template_kwargs": {"deep": True},
        }  # fmt: skip


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"mesages": []}, "unknown field 'mesages'. Did you mean: messages?"),
        ({"": 1}, "unknown field ''"),
        ({"Ü x": 1}, "unknown field 'Ü x'"),
        ({"functions": []}, "'functions' is not supported: use 'tools'"),
        ({"temperature": 3}, "temperature: Input should be less than or equal to 2"),
        ({"messages": []}, "messages: List should have at least 1 item after validation, not 0"),
        ({"messages": [{"role": "user"}]}, "messages.0: the message has no content"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs: true"),
        ({"tool_choice": "required"}, "tool_choice needs 'tools'"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens is the older name"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema is"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex: missing )"),
        ({"structured_outputs": {}}, "structured_outputs: give one of json, regex, choice, grammar"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens, 9, is above the 8 tokens that the answer may have"),
        ({"verbosity": "low"}, "'verbosity' is not supported: say in a message how long an answer should be"),
        ({"messages": [{"role": "assistant", "content": "a", "function_call": {"name": "f", "arguments": "{}"}}]},
         "messages.0.function_call is not supported: an older form of a call: use 'tool_calls'"),
        ({"messages": [{"role": "assistant", "content": "a", "audio": {"id": "x"}}]}, "messages.0.audio is not supported"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "'chat_template' is not a switch of the chat template"),
        ({"chat_template_kwargs": {"messages": []}}, "'messages' is not a switch of the chat template"),
        ({"chat_template_kwargs": {"max_length": 3}}, "'max_length' is not a switch of the chat template"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}]}]},
         "messages.0.content.0.image_url.url: a data: URI is expected"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]},
         "a data: URI is expected"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]}]},
         "images in a message: the engine of scripted cannot do that"),
    ],
)  # fmt: skip
def test_wrong_requests_are_told_in_one_line(start: Any, scripted: Any, body: dict[str, Any], message: str) -> None:
    with start(scripted(lambda request: HELLO)) as server:
        answer = server.chat(**body)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert message in error["message"]
        assert "\n" not in error["message"]
        assert (set(error), error["type"]) == ({"message", "type", "param", "code"}, "invalid_request_error")


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("completions", {"prompt": []}, "prompt: List should have at least 1 item after validation, not 0"),
        ("completions", {"prompt": "a", "min_tokens": 17}, "min_tokens, 17, is above the 16 tokens that the answer may have"),
        ("completions", {"prompt": "a", "structured_outputs": {}}, "structured_outputs: give one of json, regex"),
        ("responses", {"input": []}, "input: List should have at least 1 item after validation, not 0"),
        ("responses", {"input": [{"type": "item_reference", "id": "x"}]},
         "input.0.type: Input should be 'message' or 'function_call' or 'function_call_output' or 'reasoning'"),
        ("responses", {"input": "a", "max_output_tokens": 3, "min_tokens": 4}, "min_tokens, 4, is above the 3 tokens"),
        ("rerank", {"query": "a", "documents": [{"text": "x", "more": 1}]}, "unknown field 'documents.0.more'"),
    ],
)  # fmt: skip
def test_wrong_requests_of_other_forms(
    start: Any, scripted: Any, spoken: Any, path: str, body: dict[str, Any], message: str
) -> None:
    with start(scripted(lambda request: HELLO), spoken, spoken.tokenizer) as server:
        answer = server.client.post(f"/v1/{path}", json={"model": "scripted", **body})
        assert answer.status_code == 400
        assert message in answer.json()["error"]["message"]


def test_a_refusal_that_is_sent_back_is_what_was_said(start: Any, scripted: Any) -> None:
    engine = scripted(lambda request: HELLO)
    said = {"role": "assistant", "content": None, "refusal": "No.", "annotations": [], "audio": None, "function_call": None}
    with start(engine) as server:
        assert server.chat(messages=[{"role": "user", "content": "Hi"}, said]).status_code == 200
    assert engine.seen[-1].messages[-1] == {"role": "assistant", "content": "No."}


def test_bodies_that_are_no_json(start: Any, scripted: Any) -> None:
    with start(scripted(lambda request: HELLO), max_body=10_000) as server:
        post = server.client.post
        json_type = {"Content-Type": "application/json"}
        answer = post("/v1/chat/completions", content=b'{"model": ', headers=json_type)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")
        assert post("/v1/chat/completions", content=b"[" * 9000, headers=json_type).status_code == 400
        assert post("/v1/chat/completions", content=b"\xff\xfe", headers=json_type).status_code == 400
        assert post("/v1/chat/completions", content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415
        large = post("/v1/chat/completions", content=b"x" * 10_001, headers=json_type)
        assert (large.status_code, large.json()["error"]["message"]) == (413, "the body has more than 10000 bytes")
        chunks = post("/v1/chat/completions", content=(b"x" * 6000 for _ in range(2)), headers=json_type)  # no length is told
        assert (chunks.status_code, chunks.json()["error"]["code"]) == (413, "too_large")
        lone = b'{"model":"scripted","messages":[{"role":"user","content":"\\ud800"}]}'
        assert post("/v1/chat/completions", content=lone, headers=json_type).status_code == 400
        assert server.client.get("/nowhere").json()["error"]["message"] == "no path /nowhere"
        assert server.client.get("/v1/chat/completions").status_code == 405


def test_keys(start: Any, scripted: Any) -> None:
    with start(scripted(lambda request: HELLO), keys=("first", "sécond")) as server:
        answer = server.client.get("/v1/models")
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
        for key, status in (("first", 200), ("firs", 401), ("first2", 401)):
            headers = {"Authorization": f"Bearer {key}"}
            assert server.client.get("/v1/models", headers=headers).status_code == status
        assert server.client.get("/v1/models", headers={"Authorization": "Basic first"}).status_code == 401
        assert server.client.get("/health").status_code == 200
        assert server.client.get("/metrics").status_code == 401


def test_other_origins_and_other_names(start: Any, scripted: Any) -> None:
    engine = scripted(lambda request: HELLO)
    ask = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    with start(engine, hosts=("127.0.0.1", "localhost")) as server:
        assert "access-control-allow-origin" not in server.client.options("/v1/chat/completions", headers=ask).headers
        assert server.client.get("/health", headers={"Host": "evil.example"}).status_code == 403
    with start(engine, cors=("https://page.example",)) as server:
        answer = server.client.options("/v1/chat/completions", headers=ask)
        assert answer.headers["access-control-allow-origin"] == "https://page.example"
        other = server.client.options("/v1/chat/completions", headers=ask | {"Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers
    with start(engine, cors=("https://page.example",), keys=("first",), max_body=1000) as server:
        sent = "authorization, content-type, x-stainless-os"  # of OpenAI's client for pages
        answer = server.client.options("/v1/chat/completions", headers=ask | {"Access-Control-Request-Headers": sent})
        assert (answer.status_code, answer.headers["access-control-allow-headers"]) == (200, sent)
        page = {"Origin": "https://page.example"}
        large = server.client.post("/v1/responses", content=b"x" * 2000, headers=page | {"Authorization": "Bearer first"})
        for refused in (server.client.get("/v1/models", headers=page), large):  # else the page does not see why
            assert refused.status_code in (401, 413)
            assert refused.headers["access-control-allow-origin"] == "https://page.example"


def test_more_than_wait_are_told_to_come_again(start: Any, scripted: Any) -> None:
    gate = threading.Event()

    def script(request: Any) -> Any:
        yield "a"
        gate.wait(20)
        yield "b"

    engine = scripted(script)
    with start(engine, max_running=2, max_waiting=3) as server, ThreadPoolExecutor(8) as pool:
        taken = []
        for count in range(5):
            taken.append(pool.submit(server.chat))
            server.until(lambda n=count: server.state.admission.running + server.state.admission.waiting == n + 1)
        refused = server.chat()
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"] == {
            "message": "2 requests run and 3 wait: try again later", "type": "rate_limit_error", "param": None,
            "code": "too_many_requests",
        }  # fmt: skip
        gate.set()
        assert [one.result().status_code for one in taken] == [200] * 5
        assert engine.most == 2
        server.until(lambda: server.state.admission.running == 0)


def test_an_engine_without_concurrent_gets_one_call_at_a_time(start: Any, scripted: Any) -> None:
    engine = scripted(lambda request: ["a", 0.02, "b"], capabilities=frozenset({"stream"}))
    with start(engine) as server, ThreadPoolExecutor(6) as pool:
        assert [one.status_code for one in pool.map(lambda _: server.chat(), range(6))] == [200] * 6
        assert engine.most == 1


def test_a_request_that_takes_too_long(start: Any, scripted: Any) -> None:
    with start(scripted(lambda request: [3.0, "late"]), timeout=0.3) as server:
        answer = server.chat()
        assert (answer.status_code, answer.json()["error"]["message"]) == (504, "the request took longer than 0.3 seconds")
    with start(scripted(lambda request: ["soon", 3.0, "late"]), timeout=0.3) as server:
        *parts, last = events(server.chat(stream=True))
        assert parts[1]["choices"][0]["delta"] == {"content": "soon"}
        assert last["error"]["type"] == "timeout_error"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_place(start: Any, scripted: Any, stream: bool) -> None:
    engine = scripted(lambda request: (piece for _ in range(1000) for piece in ("a", 0.01)))
    with start(engine, max_running=1) as server:
        body = {"model": "scripted", "messages": [{"role": "user", "content": "Hi"}], "stream": stream}
        with httpx.Client(base_url=server.url) as client:
            if stream:
                with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                    next(answer.iter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post("/v1/chat/completions", json=body, timeout=0.3)
        server.until(lambda: server.state.admission.running == 0, 5)
        assert (engine.active, engine.closed) == (0, 1)
        assert server.state.live == set()
        assert "swift_cancelled_requests_total 1.0" in server.client.get("/metrics").text


def test_one_that_goes_away_while_it_waits_is_never_asked(start: Any, scripted: Any) -> None:
    gate = threading.Event()

    def script(request: Any) -> Any:
        gate.wait(20)
        yield "done"

    engine = scripted(script)
    with start(engine, max_running=1) as server, ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.chat)
        server.until(lambda: server.state.admission.running == 1)
        with pytest.raises(httpx.ReadTimeout), httpx.Client(base_url=server.url, timeout=0.2) as client:
            client.post("/v1/chat/completions", json={"model": "scripted", "messages": [{"role": "user", "content": "Hi"}]})
        server.until(lambda: server.state.admission.waiting == 0)
        gate.set()
        assert first.result().status_code == 200
        assert len(engine.seen) == 1


def test_an_engine_that_fails(start: Any, scripted: Any) -> None:
    fails, killed = [True], "the engine's process was killed by signal 9"

    def script(request: Any) -> Any:
        yield from [RuntimeError(killed)] if fails[0] else HELLO

    with start(scripted(script)) as server:
        answer = server.chat()
        assert answer.status_code == 503
        assert answer.json()["error"]["message"] == f"the engine failed: RuntimeError: {killed}"
        fails[0] = False
        assert server.chat().status_code == 200
        assert server.state.admission.running == 0
    with start(scripted(lambda request: ["a", RuntimeError("gone")])) as server:
        *parts, last = events(server.chat(stream=True))
        assert parts[1]["choices"][0]["delta"] == {"content": "a"}
        assert last == {"error": {"message": "the engine failed: RuntimeError: gone", "type": "server_error", "param": None,
                                  "code": "engine_error"}}  # fmt: skip


def test_logs_hold_no_prompt_unless_asked(start: Any, scripted: Any) -> None:
    secret = "a-secret-word"
    for prompts in (False, True):
        written = io.StringIO()
        with redirect_stderr(written), start(scripted(lambda request: HELLO), log_prompts=prompts) as server:
            message = [{"role": "user", "content": secret}]
            answer = server.client.post(
                "/v1/chat/completions", json={"model": "scripted", "messages": message}, headers={"X-Request-Id": "my-id.1"}
            )
            assert answer.headers["x-request-id"] == "my-id.1"
            assert server.chat(messages=message, foo=1).status_code == 400
            other = server.client.get("/v1/models", headers={"X-Request-Id": "no good\tid"}).headers["x-request-id"]
            assert len(other) == 32
            server.until(lambda w=written: w.getvalue().count('"request"') == 3)
        lines = [json.loads(line) for line in written.getvalue().splitlines()]
        (first,) = [line for line in lines if line.get("id") == "my-id.1"]
        assert (first["status"], first["prompt_tokens"], first["completion_tokens"], first["finish"]) == (200, 7, 5, "stop")
        assert (secret in written.getvalue()) == prompts


def test_adapters_come_and_go_inside_their_root(start: Any, scripted: Any, tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "good", root / "bad", outside):
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
    (root / "bad" / "broken").touch()
    (root / "empty").mkdir()
    (root / "link").symlink_to(outside)
    engine = scripted(lambda request: [request.adapter or "base"])

    def load(server: Any, name: str, path: str) -> tuple[int, str]:
        answer = server.client.post("/v1/load_adapter", json={"name": name, "path": path})
        return answer.status_code, answer.json().get("error", {}).get("message", "")

    with start(engine) as server:
        assert load(server, "a", "good")[0] == 403
    with start(engine, adapter_root=root) as server:
        assert load(server, "a", "good") == (200, "")
        assert server.chat(model="a").json()["choices"][0]["message"]["content"] == "a"
        assert server.chat().json()["choices"][0]["message"]["content"] == "base"
        assert [one["id"] for one in server.client.get("/v1/models").json()["data"]] == ["scripted", "a"]
        assert load(server, "a", "good") == (400, "the name 'a' is taken: unload it first, or choose another")
        assert load(server, "b", "../outside")[0] == load(server, "b", "link")[0] == load(server, "b", "/etc")[0] == 403
        assert load(server, "b", "nothing") == (400, "path: no folder 'nothing' in the server's --adapter-root")
        assert load(server, "b", "empty") == (400, "path: 'empty' holds no adapter_config.json")
        assert load(server, "b", "bad") == (400, f"adapter {root / 'bad'} cannot be loaded: it is broken")
        assert load(server, "b", "x\0y")[0] == 400
        assert server.client.post("/v1/unload_adapter", json={"name": "a"}).status_code == 200
        assert engine.adapters == {}
        gone = server.chat(model="a")
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")
        assert server.client.post("/v1/unload_adapter", json={"name": "a"}).status_code == 404


def test_many_at_once_each_get_their_own_adapter(start: Any, scripted: Any) -> None:
    engine = scripted(lambda request: [request.adapter or "base", 0.001, "!"])
    with start(engine) as server, ThreadPoolExecutor(16) as pool:
        server.state.adapters |= {name: Path() for name in "abcd"}
        models = ["scripted", *"abcd"]

        def ask(n: int) -> bool:
            name = models[n % 5]
            said = server.chat(model=name).json()["choices"][0]["message"]["content"]
            return bool(said == ("base!" if name == "scripted" else f"{name}!"))

        assert all(pool.map(ask, range(300)))


@pytest.fixture
def grown() -> Callable[[], int]:
    """Threads of generations that live."""
    return lambda: sum(thread.name == "generate" for thread in threading.enumerate())


def test_nothing_is_left_behind(start: Any, scripted: Any, grown: Callable[[], int]) -> None:
    engine = scripted(lambda request: ["a", 0.001] * 5)
    with start(engine, max_running=8) as server, ThreadPoolExecutor(16) as pool:
        codes = list(pool.map(lambda n: server.chat(stream=n % 2 == 0).status_code, range(200)))
        assert codes == [200] * 200
        server.until(lambda: grown() == 0 and server.state.admission.running == 0)
        assert (len(server.state.live), engine.active) == (0, 0)
        time.sleep(0.05)


def test_a_model_is_known_by_its_folder_or_its_run(tmp_path: Path) -> None:
    for place, name in (("base", "base"), ("mine/checkpoints/step-8", "mine")):
        (tmp_path / place).mkdir(parents=True)
        ref: Any = SimpleNamespace(name=str(tmp_path / place), folder=None, row={})
        assert Served(Opened("x", None, None, ref), Settings()).name == name  # type: ignore[arg-type]
    ref = SimpleNamespace(name="smollm2-135m-instruct", folder=None, row={})
    assert Served(Opened("x", None, None, ref), Settings()).name == "smollm2-135m-instruct"  # type: ignore[arg-type]
    assert Served(Opened("http://127.0.0.1:1/v1", None), Settings()).name == "v1"  # type: ignore[arg-type]
