"""The engine vllm: how its server is started, and, where its environment is made, the real one against the torch engine."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from swift_core.config import load_config
from swift_core.errors import RequestError, RunError
from swift_core.session import Opened, Session
from swift_core.types import Completion, Constraint, ModelFolder, Request
from swift_plugin_openai.environments import home, mark_of
from swift_plugin_vllm.config import VllmConfig
from swift_plugin_vllm.engine import SERVE, VllmEngine

FILE = "adapter_model.safetensors"
TEMPLATE: Any = SimpleNamespace(prompt=lambda *args, **kwargs: [1], decode=str, stop_ids=lambda: [2])


def lora(folder: Path, rank: int) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank}))
    (folder / "adapter_model.safetensors").touch()
    return folder


@pytest.fixture
def python(tmp_path: Path) -> str:
    path = tmp_path / "python"
    path.touch()
    return str(path)


def words_after(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_command(tmp_path: Path, python: str) -> None:
    engine = VllmEngine(ModelFolder("m", None, TEMPLATE), VllmConfig(python=python, dtype="float32", arguments=["--seed", "3"]))
    words = engine.command(1234)
    assert (words[:2], Path(words[2]).name) == ([python, "-I"], "serve.py")
    assert words_after(words, "--model") == str(Path("m").absolute())
    assert (words_after(words, "--dtype"), words_after(words, "--port"), words[-2:]) == ("float32", "1234", ["--seed", "3"])
    assert "--enforce-eager" in words
    assert "--no-enable-chunked-prefill" in words  # seeded answers to prompts read in parts end vLLM's process on a CPU
    assert "--enable-lora" not in words
    assert not engine.serial_scores
    variables = engine.variables("secret")
    assert (variables["VLLM_API_KEY"], variables["VLLM_CPU_KVCACHE_SPACE"]) == ("secret", "1")
    assert "secret" not in " ".join(words)
    engine.load_adapter("a", lora(tmp_path / "a", 12))
    words = engine.command(1)
    assert (words_after(words, "--max-loras"), words_after(words, "--max-lora-rank")) == ("1", "16")
    assert engine.serial_scores
    engine.close()


def test_no_room_for_an_adapter_is_told(tmp_path: Path, python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = VllmEngine(ModelFolder("m", None, TEMPLATE), VllmConfig(python=python, max_adapters=1, max_rank=8))
    engine.command(1)
    monkeypatch.setattr(type(engine.server), "running", property(lambda self: True))
    with pytest.raises(RequestError, match=r"rank 64\) has no room: .* Start with engine.max_adapters=1 engine.max_rank=64"):
        engine.load_adapter("a", lora(tmp_path / "a", 64))
    monkeypatch.undo()
    engine.close()


def test_environment_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIFT_CACHE", str(tmp_path))
    with pytest.raises(RequestError, match=r"engine vllm is not there\. Make it: swift-core backends install vllm"):
        VllmEngine(ModelFolder("m", None, TEMPLATE), VllmConfig())
    (tmp_path / "engines" / "vllm" / "bin").mkdir(parents=True)
    (tmp_path / "engines" / "vllm" / "bin" / "python").touch()
    with pytest.raises(RequestError, match=r"engine vllm is not whole\. Make it"):
        VllmEngine(ModelFolder("m", None, TEMPLATE), VllmConfig())
    with pytest.raises(RequestError, match=r"engine\.python: nowhere is no file"):
        VllmEngine(ModelFolder("m", None, TEMPLATE), VllmConfig(python="nowhere"))


@pytest.mark.parametrize(
    "options",
    [{"max_rows": 0}, {"max_length": 0}, {"cache_gb": 0.0}, {"memory_share": 1.5}, {"max_adapters": -1}, {"threads": 0}],
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        VllmConfig(**options)


# --- the real one -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from swift_core.config import Component
    from swift_core.index import build_index
    from swift_core.models import resolve_model
    from swift_core.registry import Registry
    from transformers import AutoModelForCausalLM

    folder = resolve_model(Registry(build_index()), Component("smollm2-135m-instruct")).source
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(str(tmp_path_factory.mktemp("adapter")))
    return Path(tmp_path_factory.getbasetemp() / "adapter0")


def session(engine: str, *options: str) -> Session:
    return Session(load_config([], list(options), {"engine": engine, "model": "smollm2-135m-instruct"}))


@pytest.fixture(scope="module")
def vllm(adapter: Path) -> Iterator[Opened]:
    if mark_of("vllm") is None:
        pytest.skip(f"{home('vllm')} is not there: swift-core backends install vllm")
    with session("vllm", "engine.dtype=float32", "engine.threads=1", "engine.max_length=1024") as opened:
        found = opened.opened()
        found.engine.load_adapter("tried", adapter)
        yield found


def ends(found: Iterator[Completion]) -> list[Completion]:
    return sorted((done for done in found if done.finish), key=lambda done: (done.index, done.choice))


def ask(text: str, **options: Any) -> Request:
    return Request([{"role": "user", "content": text}], **options)


@pytest.mark.slow
def test_tokens_and_log_probabilities_are_the_torch_engine_s(vllm: Opened, adapter: Path) -> None:
    with session("transformers", "backend.precision=fp32") as ours:
        torch_engine = ours.opened().engine
        torch_engine.load_adapter("tried", adapter)
        texts = {}
        for name in (None, "tried"):
            requests = [
                ask(text, max_tokens=24, adapter=name) for text in ("Who are you?", "Name a colour.", "Why is rain wet?")
            ]
            expected, found = ends(torch_engine.generate(requests)), ends(vllm.engine.generate(requests))
            assert [done.token_ids for done in found] == [done.token_ids for done in expected]
            assert [done.text for done in found] == [done.text for done in expected]
            assert [done.finish for done in found] == [done.finish for done in expected]
            for one, two in zip(expected, found, strict=True):
                assert two.logprobs == pytest.approx(one.logprobs, abs=1e-3)
            sequences = [done.token_ids for done in expected]
            for one, two in zip(torch_engine.logprobs(sequences, name), vllm.engine.logprobs(sequences, name), strict=True):
                assert two == pytest.approx(one, abs=1e-3)
            texts[name] = [done.text for done in found]
        assert texts[None] != texts["tried"], "the adapter changed nothing"


@pytest.mark.slow
def test_options_reach_vllm(vllm: Opened) -> None:
    engine = vllm.engine
    (chosen,) = ends(engine.generate([ask("Is water wet?", constraint=Constraint("choice", ["yes", "no"]))]))
    assert chosen.text in ("yes", "no")
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}}, "required": ["n"]}
    schema |= {"additionalProperties": False}
    (made,) = ends(engine.generate([ask("A number.", constraint=Constraint("json_schema", schema), max_tokens=40)]))
    assert isinstance(json.loads(made.text)["n"], int)
    (matched,) = ends(engine.generate([ask("A code.", constraint=Constraint("regex", "[A-C]{4}"))]))
    assert set(matched.text) <= set("ABC")
    assert len(matched.text) == 4
    grammar = 'start: "<" ("a" | "b")+ ">"'
    (written,) = ends(engine.generate([ask("Go.", constraint=Constraint("grammar", grammar), max_tokens=20)]))
    assert written.text[0] == "<"
    (stopped,) = ends(engine.generate([ask("Count: one two three", stop=[" "], max_tokens=20)]))
    assert " " not in stopped.text
    assert stopped.finish == "stop"
    drawn = ends(engine.generate([ask("Say something.", n=3, temperature=1.0, seed=5, max_tokens=12, top_logprobs=3)]))
    assert [done.choice for done in drawn] == [0, 1, 2]
    assert len({done.text for done in drawn}) > 1
    assert all(len(top) == 3 and top == sorted(top, key=lambda pair: -pair[1]) for done in drawn for top in done.top_logprobs)
    again = ends(engine.generate([ask("Say something.", n=3, temperature=1.0, seed=5, max_tokens=12)]))
    assert [done.token_ids for done in again] == [done.token_ids for done in drawn]
    asked = [
        ask(f"Say the number {n} in words, and then another one.", n=8, temperature=1.0, seed=n, max_tokens=2) for n in range(8)
    ]
    assert len(ends(engine.generate(asked))) == 64  # more tokens of prompts than vLLM reads at once
    (long,) = ends(engine.generate([ask("Hi", ignore_eos=True, max_tokens=60)]))
    assert (len(long.token_ids), long.finish) == (60, "length")
    with pytest.raises(RequestError, match="engine vllm refused the request"):
        list(engine.generate([Request(token_ids=[5] * 2000)]))


@pytest.mark.slow
def test_the_likeliest_of_a_prompt(vllm: Opened, adapter: Path) -> None:
    engine: Any = vllm.engine
    assert vllm.template is not None
    ids = vllm.template.prompt([{"role": "user", "content": "Who?"}])
    (told,), (values,) = engine.likeliest([ids], 3, "tried"), engine.logprobs([ids], "tried")
    assert [len(top) for top in told] == [3] * (len(ids) - 1)
    assert all(top == sorted(top, key=lambda pair: -pair[1]) for top in told)
    for token, value, top in zip(ids[1:], values, told, strict=True):
        assert value <= top[0][1] + 1e-4
        assert dict(top).get(token, value) == pytest.approx(value, abs=1e-4)


def test_only_who_has_the_key_is_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard that stands before vLLM's calls which change weights."""
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    spec = importlib.util.spec_from_file_location("guard", SERVE.with_name("guard.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    async def status(path: str, **headers: str) -> int:
        sent: list[Any] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200})

        async def send(message: Any) -> None:
            sent.append(message)

        given = [(name.encode(), value.encode()) for name, value in headers.items()]
        await module.Guard(app)({"type": "http", "path": path, "headers": given}, None, send)
        return int(sent[0]["status"])

    for path in ("/collective_rpc", "/v1/completions", "/pause", "/health/../collective_rpc"):
        assert asyncio.run(status(path)) == 401
        assert asyncio.run(status(path, authorization="Bearer other")) == 401
        assert asyncio.run(status(path, authorization="Bearer secret")) == 200
    assert asyncio.run(status("/health")) == 200


@pytest.fixture(scope="module")
def moved() -> tuple[Any, list[list[int]]]:
    """A checkpoint with other weights than the one that vLLM starts with, and its greedy tokens for what is asked."""
    import torch
    from swift_core.config import Component
    from swift_core.index import build_index
    from swift_core.models import resolve_model
    from swift_core.registry import Registry
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve_model(Registry(build_index()), Component("smollm2-135m-instruct")).source
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "down_proj" in name or "embed_tokens" in name:  # the output layer too, which is tied
                parameter.add_(torch.randn_like(parameter) * 0.02)
    said = []
    for request in WEIGHED:
        ids = tokenizer.apply_chat_template(
            request.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        said.append(model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist())
    return model.state_dict(), said


WEIGHED = [ask("Who are you?", max_tokens=12), ask("Name a colour.", max_tokens=12)]


def told(engine: Any) -> tuple[list[list[int]], set[int]]:
    found = ends(engine.generate(WEIGHED))
    return [done.token_ids for done in found], {done.weight_version for done in found}


@pytest.mark.slow
def test_weights_that_come_while_it_runs(moved: tuple[Any, list[list[int]]], adapter: Path) -> None:
    if mark_of("vllm") is None:
        pytest.skip(f"{home('vllm')} is not there: swift-core backends install vllm")
    weights, said = moved
    with session("vllm", "engine.dtype=float32", "engine.threads=1", "engine.max_length=512") as opened:
        engine: Any = opened.opened().engine
        first, versions = told(engine)
        assert (first != said, versions) == (True, {0})
        engine.sync_weights(iter(weights.items()), 7)
        assert told(engine) == (said, {7})  # the trainer's model, to the token; the prompts' states before are forgotten
        assert engine.server.starts == 1

        def dying() -> Iterator[Any]:
            yield from [(name, tensor * 0) for name, tensor in list(weights.items())[:50]]
            raise OSError("the trainer is gone")

        with pytest.raises(RunError, match="version 8 were not taken, 7 stays in service: the trainer is gone"):
            engine.sync_weights(dying(), 8)
        assert told(engine) == (said, {7})

        real = engine.post_weights

        async def rubbish(folder: Path) -> None:
            engine.post_weights = real
            for path in folder.glob("*.safetensors"):
                path.write_bytes(b"rubbish")
            await real(folder)

        engine.post_weights = rubbish
        with pytest.raises(RunError, match=r"version 9 were not taken, 7 stays in service: .*deserializing header"):
            engine.sync_weights(iter(weights.items()), 9)
        assert told(engine) == (said, {7})

        async def killed(folder: Path) -> None:
            engine.post_weights = real
            for pid in engine.server.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await real(folder)

        engine.post_weights = killed
        with pytest.raises(RunError, match="version 10 were not taken, 7 stays in service"):
            engine.sync_weights(iter([(name, tensor * 0) for name, tensor in weights.items()]), 10)
        assert told(engine) == (said, {7})
        assert engine.server.starts >= 2


@pytest.mark.slow
def test_an_adapter_whose_weights_come_while_it_runs(adapter: Path) -> None:
    """Of a peft model: the engine is opened with the adapter, and takes its next version; the torch engine's answer to it."""
    from safetensors.torch import load_file

    if mark_of("vllm") is None:
        pytest.skip(f"{home('vllm')} is not there: swift-core backends install vllm")
    config = load_config(
        [], ["engine.dtype=float32", "engine.threads=1", "engine.max_length=512"],
        {"engine": "vllm", "model": "smollm2-135m-instruct"},
    )  # fmt: skip
    other = {name: tensor * -1 if "lora_B" in name else tensor for name, tensor in load_file(adapter / FILE).items()}
    with Session(config) as opened:
        engine: Any = opened.opened(str(adapter)).engine
        before, versions = told(engine)
        assert versions == {0}
        engine.sync_weights(((name.replace(".weight", ".policy.weight"), tensor) for name, tensor in other.items()), 3)
        after, versions = told(engine)
        assert (after != before, versions) == (True, {3})
        with session("transformers", "backend.precision=fp32") as ours:
            torch_engine = ours.opened().engine
            changed = engine.own
            torch_engine.load_adapter("new", changed)
            expected = ends(torch_engine.generate([replace(request, adapter="new") for request in WEIGHED]))
            assert [done.token_ids for done in expected] == after
