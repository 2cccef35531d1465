"""OpenAI's own client against a `swift-core serve` process with a tiny model, for every endpoint; numbers are the model's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

ASK: list[Any] = [{"role": "user", "content": "Hi there"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather", "description": "The weather of a place.",
        "parameters": {"type": "object", "properties": {"place": {"enum": ["Rome", "Oslo"]}}, "required": ["place"],
                       "additionalProperties": False},
    },
}  # fmt: skip
SCHEMA = {
    "type": "object", "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 2, 3]}}, "required": ["ok", "n"],
    "additionalProperties": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def client(served: Any) -> OpenAI:
    return OpenAI(base_url=served.url, api_key="any", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def plain(served: Any) -> httpx.Client:
    return httpx.Client(base_url=served.url.removesuffix("/v1"), timeout=60)


@pytest.fixture(scope="module")
def greedy(sharp_folder: Path) -> Callable[[list[int], int], tuple[list[int], list[float]]]:
    """Greedy tokens and their log-probabilities, by the transformers library alone."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(sharp_folder, dtype=torch.float32)

    def answer(prompt: list[int], count: int) -> tuple[list[int], list[float]]:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            made = model.generate(ids, max_new_tokens=count, do_sample=False)
            scores = torch.log_softmax(model(made).logits[0].float(), -1)
        new = made[0, len(prompt) :].tolist()
        return new, [float(scores[len(prompt) - 1 + n, token]) for n, token in enumerate(new)]

    return answer


@pytest.fixture(scope="module")
def can(plain: httpx.Client) -> set[str]:
    return set(plain.get("/v1/models").json()["data"][0]["capabilities"])


def test_models(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "swift-core")
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match=r"model 'tny' is not served here\. Did you mean: tiny"):
        client.models.retrieve("tny")


def test_greedy_answers_are_those_of_the_model(client: OpenAI, plain: httpx.Client, greedy: Any) -> None:
    prompt = plain.post("/tokenize", json={"messages": ASK}).json()
    assert prompt["count"] == len(prompt["tokens"])
    new, scores = greedy(prompt["tokens"], 12)
    whole = client.chat.completions.create(
        model="tiny", messages=ASK, temperature=0, max_completion_tokens=12, logprobs=True, top_logprobs=2
    )
    (choice,) = whole.choices
    assert choice.message.role == "assistant"
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (prompt["count"], len(new))
    assert choice.finish_reason == ("stop" if len(new) < 12 else "length")
    assert choice.logprobs is not None
    told = choice.logprobs.content or []
    text = plain.post("/detokenize", json={"tokens": new}).json()["prompt"]
    assert b"".join(bytes(one.bytes or ()) for one in told).decode(errors="replace") == text
    assert [one.logprob for one in told] == pytest.approx(scores, abs=1e-3)
    for one in told:
        assert one.top_logprobs[0].logprob == pytest.approx(one.logprob, abs=1e-6)  # greedy: it is the likeliest
        assert one.top_logprobs[0].token == one.token
        assert len(one.top_logprobs) == 2


def test_streamed_equals_whole(client: OpenAI) -> None:
    ask: dict[str, Any] = {"model": "tiny", "messages": ASK, "temperature": 0, "max_completion_tokens": 12}
    whole = client.chat.completions.create(**ask)
    parts = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert len({part.id for part in parts}) == 1
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == whole.choices[0].message.content
    assert [part.choices[0].finish_reason for part in parts if part.choices][-1] == whole.choices[0].finish_reason
    assert parts[-1].usage is not None
    assert whole.usage is not None
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_choices_seeds_and_bias(client: OpenAI, plain: httpx.Client) -> None:
    ask: dict[str, Any] = {"model": "tiny", "messages": ASK, "temperature": 1.5, "max_completion_tokens": 12}
    first, again = (client.chat.completions.create(**ask, seed=5) for _ in range(2))
    assert first.choices[0].message.content == again.choices[0].message.content
    several = client.chat.completions.create(**ask, n=3, seed=5)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in several.choices}) > 1
    (letter,) = plain.post("/tokenize", json={"prompt": "x"}).json()["tokens"]
    forced = client.chat.completions.create(model="tiny", messages=ASK, max_completion_tokens=4, logit_bias={str(letter): 100})
    assert forced.choices[0].message.content == "xxxx"
    stopped = client.chat.completions.create(
        model="tiny", messages=ASK, max_completion_tokens=9, logit_bias={str(letter): 100}, stop=["xx"]
    )
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("", "stop")
    assert stopped.usage is not None
    assert stopped.usage.completion_tokens == 2


def test_completions(client: OpenAI, plain: httpx.Client, greedy: Any) -> None:
    ids = plain.post("/tokenize", json={"prompt": "One two"}).json()["tokens"]
    new, scores = greedy(ids, 6)
    text = client.completions.create(model="tiny", prompt="One two", temperature=0, max_tokens=6, logprobs=2)
    same = client.completions.create(model="tiny", prompt=ids, temperature=0, max_tokens=6)
    assert text.choices[0].text == same.choices[0].text
    told = text.choices[0].logprobs
    assert told is not None
    assert told.token_logprobs == pytest.approx(scores, abs=1e-3)
    assert told.text_offset == [sum(map(len, told.tokens[:n])) for n in range(len(new))]
    assert all(len(top) <= 3 for top in told.top_logprobs or ()), "the two likeliest, and the one that was drawn"
    several = client.completions.create(model="tiny", prompt=["One two", "Three"], temperature=0, max_tokens=6, n=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == several.choices[1].text == text.choices[0].text
    echoed = client.completions.create(model="tiny", prompt="One two", temperature=0, max_tokens=6, echo=True)
    assert echoed.choices[0].text == "One two" + text.choices[0].text
    parts = list(client.completions.create(model="tiny", prompt=["One two", "Three"], temperature=0, max_tokens=6, stream=True))
    joined = ["".join(part.choices[0].text for part in parts if part.choices[0].index == n) for n in range(2)]
    assert joined == [several.choices[0].text, several.choices[2].text]


def test_a_prompt_is_scored(client: OpenAI, plain: httpx.Client, greedy: Any) -> None:
    ids = plain.post("/tokenize", json={"prompt": "One two"}).json()["tokens"]
    new, scores = greedy(ids, 3)
    whole = client.completions.create(model="tiny", prompt=[*ids, *new], max_tokens=0, echo=True, logprobs=0)
    told = whole.choices[0].logprobs
    assert told is not None
    assert told.token_logprobs is not None
    assert (told.token_logprobs[0], len(told.token_logprobs)) == (None, len(ids) + 3)
    assert told.token_logprobs[-3:] == pytest.approx(scores, abs=1e-3)
    assert whole.choices[0].finish_reason == "length"
    best = client.completions.create(
        model="tiny", prompt="One", max_tokens=5, n=1, best_of=4, seed=1, temperature=1, logprobs=0
    )
    assert len(best.choices) == 1


@pytest.mark.parametrize("count", [0, 2])
def test_what_is_likeliest_in_a_prompt(client: OpenAI, plain: httpx.Client, sharp_folder: Path, count: int) -> None:
    """echo with logprobs above 0, whole and streamed, against the transformers library's distribution."""
    import torch
    from swift_plugin_serve.tokens import Tokens
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = Tokens(AutoTokenizer.from_pretrained(sharp_folder))
    model = AutoModelForCausalLM.from_pretrained(sharp_folder, dtype=torch.float32)
    prompts = [plain.post("/tokenize", json={"prompt": text}).json()["tokens"] for text in ("One two", "Three")]
    ask: dict[str, Any] = {"model": "tiny", "prompt": prompts, "max_tokens": count, "echo": True, "logprobs": 3}
    whole = client.completions.create(**ask, temperature=0, extra_body={"ignore_eos": True})
    parts = list(client.completions.create(**ask, temperature=0, extra_body={"ignore_eos": True}, stream=True))
    for n, ids in enumerate(prompts):
        told = whole.choices[n].logprobs
        assert told is not None
        assert told.tokens is not None
        assert told.token_logprobs is not None
        assert told.top_logprobs is not None
        assert len(told.tokens) == len(told.top_logprobs) == len(ids) + count
        with torch.inference_mode():
            scores = torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1].float(), -1)
        expected: list[dict[str, float]] = []
        for token, row in zip(ids[1:], scores, strict=True):
            likeliest = [*zip(*(part.tolist() for part in row.topk(3)), strict=True), (float(row[token]), token)]
            expected.append({})
            for value, ident in likeliest:
                expected[-1].setdefault(tokens.text(ident), value)
        assert told.top_logprobs[0] is None
        for found, place in zip(told.top_logprobs[1:], expected, strict=False):
            assert found == pytest.approx(place, abs=1e-3)
        assert told.token_logprobs[1 : len(ids)] == pytest.approx(
            [float(row[token]) for token, row in zip(ids[1:], scores, strict=True)], abs=1e-3
        )
        for top, value in zip(told.top_logprobs[len(ids) :], told.token_logprobs[len(ids) :], strict=True):
            assert max(top.values()) == pytest.approx(value)
        mine = [part.choices[0] for part in parts if part.choices[0].index == n]
        assert "".join(choice.text for choice in mine) == whole.choices[n].text
        streamed = [part.logprobs for part in mine if part.logprobs]
        assert [top for one in streamed for top in one.top_logprobs or ()] == told.top_logprobs
        assert [at for one in streamed for at in one.text_offset or ()] == told.text_offset


def test_what_cannot_be_is_told(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="'suffix' is not supported"):
        client.completions.create(model="tiny", prompt="a", suffix="b")
    with pytest.raises(openai.BadRequestError, match=r"the prompt has .* tokens, and tiny takes 1024 with the answer"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a" * 2000}])
    with pytest.raises(openai.BadRequestError, match="1100 are asked for: tiny takes 1024 together"):
        client.chat.completions.create(model="tiny", messages=ASK, max_completion_tokens=1100)
    with pytest.raises(openai.NotFoundError, match="model 'other' is not served here"):
        client.chat.completions.create(model="other", messages=ASK)
    with pytest.raises(openai.BadRequestError, match="embeddings need a model with a pooled head"):
        client.embeddings.create(model="tiny", input="a")
    with pytest.raises(openai.BadRequestError, match="prompt: no token 999"):
        client.completions.create(model="tiny", prompt=[999])
    with pytest.raises(openai.BadRequestError, match="'reasoning_effort' is not supported"):
        client.chat.completions.create(model="tiny", messages=ASK, reasoning_effort="low")


def test_forms_of_an_answer(client: OpenAI, can: set[str]) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}}
    ask: dict[str, Any] = {"model": "tiny", "messages": ASK, "max_completion_tokens": 200, "seed": 3}
    if "constraint" not in can:
        with pytest.raises(openai.BadRequestError, match="an answer of a given form: the engine of tiny cannot do that"):
            client.chat.completions.create(**ask, response_format=form)
        pytest.skip("this engine has no constraints")
    for stream in (False, True):
        found = client.chat.completions.create(**ask, response_format=form, stream=stream)
        text = "".join(p.choices[0].delta.content or "" for p in found) if stream else found.choices[0].message.content
        value = json.loads(text)
        assert set(value) == {"ok", "n"}
        assert value["n"] in (1, 2, 3)
        assert isinstance(value["ok"], bool)
    chosen = client.chat.completions.create(**ask, extra_body={"structured_outputs": {"choice": ["left", "right"]}})
    assert chosen.choices[0].message.content in ("left", "right")
    digits = client.chat.completions.create(**ask, extra_body={"structured_outputs": {"regex": "[0-9]{4}"}})
    assert (digits.choices[0].message.content or "").isdigit()


def test_responses(client: OpenAI) -> None:
    ask: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_output_tokens": 12}
    whole = client.responses.create(**ask, input="Hi there", instructions="Be brief.")
    assert whole.status in ("completed", "incomplete")
    assert whole.usage is not None
    assert whole.usage.output_tokens <= 12
    events = list(client.responses.create(**ask, input="Hi there", instructions="Be brief.", stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", f"response.{whole.status}",
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[-1].response.output_text == whole.output_text  # type: ignore[union-attr]
    assert client.responses.retrieve(whole.id).output_text == whole.output_text


def test_responses_go_on(client: OpenAI) -> None:
    ask: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_output_tokens": 8}
    first = client.responses.create(**ask, input="Hi there")
    second = client.responses.create(**ask, input="And now?", previous_response_id=first.id)
    talk: Any = [
        {"role": "user", "content": "Hi there"}, {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And now?"},
    ]  # fmt: skip
    assert client.responses.create(**ask, input=talk).output_text == second.output_text
    chat = client.chat.completions.create(model="tiny", messages=talk, temperature=0, max_completion_tokens=8)
    assert chat.choices[0].message.content == second.output_text
    unkept = client.responses.create(**ask, input="Hi there", store=False)
    for gone in (unkept.id, "resp_0"):
        with pytest.raises(openai.NotFoundError, match="is not kept here"):
            client.responses.create(**ask, input="And now?", previous_response_id=gone)
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


def test_tokenize_and_back(plain: httpx.Client) -> None:
    text = "Grüße, 世界 <|im_end|>"
    found = plain.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == 1024
    assert found["token_strs"][-1] == "<|im_end|>"
    assert plain.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": text}
    assert plain.post("/tokenize", json={}).status_code == 400


def test_health_and_metrics(client: OpenAI, plain: httpx.Client) -> None:
    assert plain.get("/health").json() == {"status": "ok", "model": "tiny", "running": 0, "waiting": 0}

    def count(name: str) -> float:
        lines = plain.get("/metrics").text.splitlines()
        return math.fsum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{"))

    before = count("swift_generated_tokens_total")
    used = client.chat.completions.create(model="tiny", messages=ASK, temperature=0, max_completion_tokens=7).usage
    assert used is not None
    assert count("swift_generated_tokens_total") - before == used.completion_tokens


def test_what_is_described_is_what_is_there(plain: httpx.Client) -> None:
    described = plain.get("/openapi.json").json()
    assert set(described["paths"]) == {
        "/health", "/metrics", "/v1/models", "/v1/models/{model}", "/v1/chat/completions", "/v1/completions", "/v1/responses",
        "/v1/responses/{ident}", "/v1/embeddings", "/v1/rerank", "/tokenize", "/detokenize", "/v1/load_adapter",
        "/v1/unload_adapter",
    }  # fmt: skip
    chat = described["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert chat["200"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ChatReply"}
    assert chat["400"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Error"}
    assert "text/event-stream" in chat["200"]["content"]
    assert "422" not in chat
