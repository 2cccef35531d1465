"""The engine openai against a server over a real socket: what goes out, what comes back, and every fault's one line."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from openai_server import LOGPROB, Fake, serving
from swift_core.errors import CapabilityError, RequestError, RunError
from swift_core.testing import EngineContract
from swift_core.types import Completion, Constraint, Request
from swift_plugin_openai.config import OpenAIConfig
from swift_plugin_openai.engine import OpenAIEngine

Make = Callable[..., OpenAIEngine]


class TestOpenAI(EngineContract):
    distribution, id = "swift-plugin-openai", "openai"

    @pytest.fixture
    def source(self) -> Iterator[str]:
        with serving(owner="vllm") as server:
            yield server.url


@pytest.fixture
def server() -> Iterator[Fake]:
    with serving() as fake:
        yield fake


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[OpenAIEngine] = []

    def make(server: Fake | str, **options: Any) -> OpenAIEngine:
        made.append(OpenAIEngine(server if isinstance(server, str) else server.url, OpenAIConfig(**options)))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def ask(text: str, **options: Any) -> Request:
    return Request([{"role": "user", "content": text}], **options)


def one(found: Iterator[Completion]) -> Completion:
    (completion,) = [completion for completion in found if completion.finish]
    return completion


def test_messages_go_out_as_they_are_and_an_answer_comes_back(server: Fake, make: Make) -> None:
    engine = make(server)
    asked = ask("tea", max_tokens=9, temperature=0.5, top_p=0.9, presence_penalty=0.1, seed=7, stop=["z"], logit_bias={5: 2.0})
    done = one(engine.generate([asked]))
    assert (done.text, done.finish, done.prompt_tokens, done.cached_tokens) == ("7.0 tea", "stop", 1, 1)
    assert (done.token_ids, done.logprobs) == ([], [])
    assert done.message == {"role": "assistant", "content": "7.0 tea"}
    assert server.seen == [
        {
            "model": "parrot", "stream": False, "temperature": 0.5, "top_p": 0.9, "max_tokens": 9, "presence_penalty": 0.1,
            "seed": 7, "stop": ["z"], "logit_bias": {"5": 2.0}, "messages": [{"role": "user", "content": "tea"}],
        }
    ]  # fmt: skip


def test_token_ids_go_to_completions(server: Fake, make: Make) -> None:
    done = one(make(server, dialect="vllm").generate([Request(token_ids=list(b"abc"), max_tokens=2, top_logprobs=2, top_k=5)]))
    assert (done.text, done.token_ids, done.finish, done.prompt_tokens) == ("ab", [97, 98], "length", 3)
    assert done.logprobs == [LOGPROB, LOGPROB]
    assert done.top_logprobs == [[(97, LOGPROB), (0, LOGPROB - 1)], [(98, LOGPROB), (0, LOGPROB - 1)]]
    assert server.seen[0]["prompt"] == [97, 98, 99]
    assert server.seen[0]["top_k"] == 5


@pytest.mark.parametrize("dialect", ["openai", "vllm"])
def test_streamed_and_whole_agree(server: Fake, make: Make, dialect: Any) -> None:
    engine = make(server, dialect=dialect, logprobs=True)
    for request in (ask("one two", n=3, seed=1, top_logprobs=1), Request(token_ids=list(b"xyz"), n=2)):
        found = list(engine.generate([request], stream=True))
        ends = {done.choice: done for done in found if done.finish}
        whole = {done.choice: done for done in engine.generate([request]) if done.finish}
        assert ends == whole
        assert sorted(ends) == list(range(request.n))
        for choice, done in ends.items():
            pieces = [piece for piece in found if piece.choice == choice and not piece.finish]
            assert len(pieces) == len(done.text) > 1
            assert "".join(piece.text for piece in pieces) == done.text
            ids = list(done.text.encode()) if dialect == "vllm" else []
            assert [token for piece in pieces for token in piece.token_ids] == done.token_ids == ids
            assert [value for piece in pieces for value in piece.logprobs] == done.logprobs == [LOGPROB] * len(done.text)


def test_likeliest_tokens_without_ids_stand_in_the_message(server: Fake, make: Make) -> None:
    done = one(make(server).generate([ask("ab", top_logprobs=1)]))
    assert (done.top_logprobs, done.logprobs) == ([], [LOGPROB, LOGPROB])
    assert done.message is not None
    assert [entry["token"] for entry in done.message["logprobs"]] == ["a", "b"]
    assert done.message["logprobs"][0]["top_logprobs"] == [{"token": "a", "logprob": LOGPROB}]


@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls_come_back_apart(server: Fake, make: Make, stream: bool) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    done = one(make(server).generate([ask("Rain?", tools=tools)], stream))
    assert (done.text, done.finish) == ("", "stop")
    assert done.message is not None
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    assert done.message["tool_calls"] == [call]
    assert server.seen[0]["tools"] == tools


def test_a_conversation_with_calls_is_sent_in_openai_form(server: Fake, make: Make) -> None:
    rows = [
        {"role": "user", "content": "Rain?", "train": False},
        {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Oslo"}}}], "weight": 0.5},
        {"role": "tool", "content": "wet"},
    ]
    one(make(server).generate([Request(rows)]))
    call = {"id": "call_1_0", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    assert server.seen[0]["messages"] == [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "wet", "tool_call_id": "call_1_0"},
    ]


def test_pictures_and_sounds_go_as_data(server: Fake, make: Make, tmp_path: Path) -> None:
    picture = tmp_path / "p.png"
    picture.write_bytes(b"\x89PNGxy")
    parts = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}, {"type": "audio"}]
    media = {"images": [str(picture), "https://x.org/y.jpg"], "audios": [b"ID3z"]}
    engine = make(server)
    one(engine.generate([Request([{"role": "user", "content": parts}], media=media)]))
    assert server.seen[0]["messages"][0]["content"] == [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBOR3h5"}},
        {"type": "text", "text": "and"},
        {"type": "image_url", "image_url": {"url": "https://x.org/y.jpg"}},
        {"type": "input_audio", "input_audio": {"data": "SUQzeg==", "format": "mp3"}},
    ]
    for media, message in (
        ({"images": ["nowhere.png", "b"], "audios": [b""]}, "image nowhere.png: No such file"),
        ({"images": ["https://x.org/1"], "audios": [b""]}, "shows an image that the request does not have"),
        ({"images": ["https://x.org/1"] * 3, "audios": [b""]}, "more images than its messages have parts for"),
    ):
        with pytest.raises(RequestError, match=message):
            list(engine.generate([Request([{"role": "user", "content": parts}], media=media)]))


def test_constraints(server: Fake, make: Make) -> None:
    schema = {"type": "object", "properties": {"said": {"type": "string"}}}
    engine = make(server)
    done = one(engine.generate([ask("hm", constraint=Constraint("json_schema", schema))]))
    assert done.text == '{"said": "hm"}'
    assert server.seen[0]["response_format"]["json_schema"] == {"name": "answer", "schema": schema, "strict": True}
    one(engine.generate([ask("hm", constraint=Constraint("json_object"))]))
    assert server.seen[1]["response_format"] == {"type": "json_object"}
    with pytest.raises(CapabilityError, match="constraint regex: OpenAI's API has json_schema and json_object"):
        list(engine.generate([ask("hm", constraint=Constraint("regex", "a+"))]))
    one(make(server, dialect="vllm").generate([ask("hm", constraint=Constraint("regex", "a+"))]))
    assert server.seen[2]["structured_outputs"] == {"regex": "a+"}


@pytest.mark.parametrize(
    ("options", "named"),
    [({"top_k": 4}, "top_k"), ({"min_p": 0.1}, "min_p"), ({"stop_ids": [3]}, "stop_ids"), ({"ignore_eos": True}, "ignore_eos"),
     ({"repetition_penalty": 1.1}, "repetition_penalty"), ({"template_kwargs": {"a": 1}}, "template_kwargs")],
)  # fmt: skip
def test_what_openai_lacks_is_refused_and_vllm_is_sent(server: Fake, make: Make, options: dict[str, Any], named: str) -> None:
    with pytest.raises(CapabilityError, match=f"^{named} is not of OpenAI's API; .*engine.dialect=vllm"):
        list(make(server).generate([ask("a", **options)]))
    server.owner = "vllm"  # as its list of models says
    one(make(server).generate([ask("a", **options)]))
    renamed = {"stop_ids": "stop_token_ids", "template_kwargs": "chat_template_kwargs"}.get(named, named)
    assert server.seen[-1][renamed] == options[named]


def test_log_probabilities_of_a_prompt(server: Fake, make: Make) -> None:
    assert make(server).logprobs([[97, 98, 99], [65]]) == [[LOGPROB, LOGPROB], []]
    assert make(server, dialect="vllm").logprobs([[97, 98, 99], [65, 66]]) == [[-98.0, -99.0], [-66.0]]
    assert make(server, dialect="vllm").likeliest([[97, 98], [65]], 2) == [[[(98, -98.0)]], []]
    with pytest.raises(CapabilityError, match="as texts, not as ids"):
        make(server).likeliest([[97, 98]], 2)


def test_many_run_at_once_within_the_bound(make: Make) -> None:
    with serving(delay=0.15) as server:
        engine, started = make(server, concurrent=4), time.monotonic()
        found = list(engine.generate([ask(str(n)) for n in range(12)]))
        assert sorted((done.index, done.text) for done in found) == sorted((n, str(n)) for n in range(12))
        assert server.most_busy == 4
        assert 3 * 0.15 <= time.monotonic() - started < 12 * 0.15


def test_closing_the_iterator_hangs_up(make: Make) -> None:
    with serving(delay=0.02) as server:
        found = make(server).generate([ask("x" * 500) for _ in range(3)], stream=True)
        assert next(found).text == "x"
        found.close()
        until = time.monotonic() + 5
        while server.hung_up < 3 and time.monotonic() < until:
            time.sleep(0.02)
        assert server.hung_up == 3


# --- faults -----------------------------------------------------------------------------------------------------------


def patient(engine: OpenAIEngine) -> list[float]:
    """Let pauses pass at once; the list of those that were asked for."""
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    engine.client._sleep = sleep
    return pauses


def test_tries_again_and_honours_retry_after(server: Fake, make: Make) -> None:
    engine = make(server, model="parrot", dialect="openai")
    pauses = patient(engine)
    server.faults = [(429, {"retry-after": "7"}, "slow"), (503, {}, ""), (0, {}, ""), (500, {}, "oops")]
    assert one(engine.generate([ask("hi")])).text == "hi"
    assert pauses[0] == 7
    assert all(0.25 * 2**n <= pauses[n] <= 0.5 * 2**n for n in (1, 2, 3))


def test_gives_up_with_the_last_reason(server: Fake, make: Make) -> None:
    engine = make(server, model="parrot", dialect="openai", retries=2)
    assert len(patient(engine)) == 0
    server.faults = [(503, {}, '{"error": {"message": "overloaded"}}')] * 3
    with pytest.raises(RunError, match=r"^the server at http://127.0.0.1:\d+/v1 failed after 3 tries \(503: overloaded\)$"):
        list(engine.generate([ask("hi")]))
    server.faults = [(429, {"retry-after": "3600"}, "quota")]
    with pytest.raises(RunError, match=r"asks to wait 3600 seconds \(429: quota\)"):
        list(engine.generate([ask("hi")]))
    assert not server.faults


def test_a_stream_that_breaks_off_is_told_not_tried_again(server: Fake, make: Make) -> None:
    server.break_after = 2
    found = make(server).generate([ask("hello")], stream=True)
    assert [next(found).text, next(found).text] == ["h", "e"]
    with pytest.raises(RunError, match="broke off in its answer"):
        next(found)
    assert len(server.seen) == 1


def test_unreachable_and_silent(server: Fake, make: Make) -> None:
    engine = make("http://127.0.0.1:9/v1", retries=1)
    patient(engine)
    with pytest.raises(RunError, match=r"^the server at http://127.0.0.1:9/v1 cannot be reached after 2 tries .*Is it running"):
        list(engine.generate([ask("hi")]))
    server.delay = 1.0
    with pytest.raises(RunError, match=r"said nothing for 0.2 seconds \(engine.timeout\)"):
        list(make(server, timeout=0.2).generate([ask("hi")]))


def test_api_key_is_sent_and_never_told(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(key="sk-secret") as server:
        monkeypatch.setenv("OPENAI_API_KEY", "sk-of-openai")
        with pytest.raises(RequestError, match=r"asks for an API key: engine.api_key_env=NAME names its variable \(401"):
            list(make(server).generate([ask("hi")]))
        assert "authorization" not in "".join(key for found in server.headers for key in found)
        monkeypatch.setenv("MINE", "sk-wrong")
        with pytest.raises(RequestError, match=r"refused the API key \(401: Incorrect API key provided: Bearer \*\*\*\)"):
            list(make(server, api_key_env="MINE").generate([ask("hi")]))
        monkeypatch.setenv("MINE", "sk-secret")
        engine = make(server, api_key_env="MINE")
        assert one(engine.generate([ask("hi")])).text == "hi"
        assert "sk-secret" not in repr(engine.config)
        with pytest.raises(RequestError, match="the environment has no variable OTHER"):
            make(server, api_key_env="OTHER")
        with pytest.raises(RequestError, match="the address holds a password"):
            make(server.url.replace("http://", "http://me:pw@"))


def test_models(make: Make) -> None:
    with serving(models=["parrot", "owl"]) as server:
        with pytest.raises(RequestError, match=r"has 2 models: parrot, owl; choose one: engine\.model=NAME"):
            list(make(server).generate([ask("hi")]))
        with pytest.raises(RequestError, match=r"has no model 'parot'. Did you mean: parrot\? It has: parrot, owl"):
            list(make(server, model="parot").generate([ask("hi")]))
        with pytest.raises(RequestError, match=r"has no model 'parot'. Did you mean: parrot\? It has: parrot, owl"):
            list(make(server, model="parot", dialect="openai").generate([ask("hi")]))  # the server's own 404
        assert one(make(server, model="owl").generate([ask("hi")])).text == "hi"
        assert server.seen[-1]["model"] == "owl"


def test_what_it_cannot_do(server: Fake, make: Make, tmp_path: Path) -> None:
    engine = make(server)
    for call in (
        lambda: engine.load_adapter("a", tmp_path), lambda: engine.unload_adapter("a"), lambda: engine.embed([[1]]),
        lambda: engine.score([[1]]), lambda: engine.sync_weights(iter(()), 1), engine.sleep, engine.wake,
        lambda: list(engine.generate([ask("hi", adapter="a")])), lambda: engine.logprobs([[1]], "a"),
    ):  # fmt: skip
        with pytest.raises(CapabilityError):
            call()
    with pytest.raises(RequestError, match="neither messages nor token ids"):
        list(engine.generate([Request()]))
    assert server.seen == []


@pytest.mark.parametrize("options", [{"concurrent": 0}, {"timeout": 0.0}, {"retries": -1}, {"max_wait": -1.0}])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        OpenAIConfig(**options)
