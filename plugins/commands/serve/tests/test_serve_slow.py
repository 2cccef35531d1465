"""The embedded model behind the server, and the load benchmark in short."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

ROOT = Path(__file__).parents[4]
QUESTIONS = ["What is the capital of France?", "Name three colours.", "Why is the sky blue?"]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather", "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}},
                       "required": ["city"], "additionalProperties": False},
    },
}  # fmt: skip
FORM: Any = {
    "type": "json_schema",
    "json_schema": {"name": "city", "schema": {
        "type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, "large": {"type": "boolean"}},
        "required": ["name", "large"], "additionalProperties": False}},
}  # fmt: skip


@pytest.fixture(scope="module")
def client(start_process: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    log = tmp_path_factory.mktemp("embedded") / "log"
    with start_process(log, "--model", "smollm2-135m-instruct", "backend.precision=fp32") as process:
        yield OpenAI(base_url=process.url, api_key="any", max_retries=0, timeout=300)


@pytest.mark.slow
def test_greedy_answers_are_those_of_generate(client: OpenAI) -> None:
    """Token for token, or else a near-tie of the two likeliest (1e-3)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    command = [sys.executable, "-m", "swift_core.cli.main", "models", "show", "smollm2-135m-instruct", "--json"]
    folder = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["folder"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    for question in QUESTIONS:
        messages: Any = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.inference_mode():
            made = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :].tolist()
        answer = client.chat.completions.create(
            model="smollm2-135m-instruct",
            messages=messages,
            temperature=0,
            max_completion_tokens=24,
            logprobs=True,
            top_logprobs=2,
        ).choices[0]
        assert answer.logprobs is not None
        told = answer.logprobs.content or []
        wanted = [tokenizer.decode([token]) for token in made]
        for one, token in zip(told, wanted, strict=True):
            if one.token != token:
                gap = one.top_logprobs[0].logprob - one.top_logprobs[1].logprob
                assert gap < 1e-3, f"{question}: {one.token!r} is not {token!r}, and the gap is {gap}"
                break


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_forms_always_parse(client: OpenAI, stream: bool) -> None:
    ask: dict[str, Any] = {"model": "smollm2-135m-instruct", "messages": [{"role": "user", "content": "Tell me of Rome."}]}
    for seed in range(3):
        found: Any = client.chat.completions.create(
            **ask, response_format=FORM, seed=seed, max_completion_tokens=64, stream=stream
        )
        text = "".join(p.choices[0].delta.content or "" for p in found) if stream else found.choices[0].message.content
        assert set(json.loads(text)) == {"name", "large"}


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_demanded_call_always_parses(client: OpenAI, choice: Any, stream: bool) -> None:
    found: Any = client.chat.completions.create(
        model="smollm2-135m-instruct", messages=[{"role": "user", "content": "How is the weather in Rome?"}], tools=[TOOL],
        tool_choice=choice, parallel_tool_calls=False, max_completion_tokens=80, temperature=0, stream=stream,
    )  # fmt: skip
    if stream:
        parts = list(found)
        pieces = [call for part in parts for call in part.choices[0].delta.tool_calls or ()]
        name, arguments = pieces[0].function.name, "".join(call.function.arguments or "" for call in pieces)
        assert parts[-1].choices[0].finish_reason == "tool_calls"
    else:
        (call,) = found.choices[0].message.tool_calls
        name, arguments = call.function.name, call.function.arguments
        assert found.choices[0].finish_reason == "tool_calls"
    assert name == "weather"
    assert json.loads(arguments)["city"] in ("Rome", "Oslo")


@pytest.mark.slow
def test_it_holds_under_load() -> None:
    command = [sys.executable, "-m", "benchmarks.serve.load", "--clients", "20", "--seconds", "8", "--swaps", "80", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    found = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, found["broken"], found["wrong"], found["swaps"]) == (0, [], 0, 80)
    assert found["requests"]["200"] > 20
