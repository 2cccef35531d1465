"""The engine openvino: options and what it lacks, and, where its environment is made, the real one against the torch engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from swift_core.config import load_config
from swift_core.errors import CapabilityError, RequestError, RunError
from swift_core.session import Opened, Session
from swift_core.types import Completion, Constraint, ModelFolder, Request
from swift_plugin_openai.environments import home, mark_of
from swift_plugin_openvino.config import OpenVINOConfig
from swift_plugin_openvino.engine import OpenVINOEngine
from swift_plugin_openvino.export import content_of, exported

TEMPLATE: Any = SimpleNamespace(prompt=lambda *args, **kwargs: [1], decode=str, stop_ids=lambda: [2])


def test_a_checkpoint_is_known_by_its_content(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(bytes(3 << 20))
    assert content_of(tmp_path / "a") == content_of(tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").write_bytes(bytes((3 << 20) - 1) + b"x")
    assert content_of(tmp_path / "a") != content_of(tmp_path / "b")


def test_an_export_that_fails_says_why_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIFT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "python").write_text("#!/bin/sh\necho 'no such architecture' >&2\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(RunError, match="cannot be exported for OpenVINO: no such architecture"):
        exported(tmp_path, "fp32", str(tmp_path / "python"))
    assert list((tmp_path / "cache" / "openvino").iterdir()) == []


def test_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "python").touch()
    engine = OpenVINOEngine(ModelFolder("m", None, TEMPLATE), OpenVINOConfig(python=str(tmp_path / "python")))
    for request, message in (
        (Request(token_ids=[1], logit_bias={1: 1.0}), "has no logit_bias"),
        (Request(token_ids=[1], top_logprobs=2), "has no top_logprobs"),
        (Request(token_ids=[1], constraint=Constraint("grammar", "start: /a/")), "no Lark grammar"),
    ):
        with pytest.raises(CapabilityError, match=message):
            list(engine.generate([request]))
    with pytest.raises(CapabilityError, match="engine openvino cannot take weights while it runs"):
        engine.sync_weights(iter(()), 1)
    engine.close()
    with pytest.raises(ValueError, match="max_rows must be at least 1"):
        OpenVINOConfig(max_rows=0)


def ends(found: Iterator[Completion]) -> list[Completion]:
    return sorted((done for done in found if done.finish), key=lambda done: (done.index, done.choice))


def ask(text: str, **options: Any) -> Request:
    return Request([{"role": "user", "content": text}], **options)


@pytest.fixture(scope="module")
def opened() -> Iterator[Opened]:
    if mark_of("openvino") is None:
        pytest.skip(f"{home('openvino')} is not there: swift-core backends install openvino")
    options = ["engine.precision=fp32", "engine.threads=1"]
    with Session(load_config([], options, {"engine": "openvino", "model": "smollm2-135m-instruct"})) as session:
        yield session.opened()


@pytest.mark.slow
def test_tokens_and_log_probabilities_are_the_torch_engine_s(opened: Opened) -> None:
    requests = [ask(text, max_tokens=24) for text in ("Who are you?", "Name a colour.", "Why is rain wet?")]
    with Session(load_config([], ["backend.precision=fp32"], {"model": "smollm2-135m-instruct"})) as ours:
        torch_engine = ours.opened().engine
        expected, found = ends(torch_engine.generate(requests)), ends(opened.engine.generate(requests))
        assert [(d.token_ids, d.text, d.finish) for d in found] == [(d.token_ids, d.text, d.finish) for d in expected]
        for one, two in zip(expected, found, strict=True):
            assert two.logprobs == pytest.approx(one.logprobs, abs=1e-3)
        sequences = [done.token_ids for done in expected]
        for one_, two_ in zip(torch_engine.logprobs(sequences), opened.engine.logprobs(sequences), strict=True):
            assert two_ == pytest.approx(one_, abs=1e-3, rel=3e-4)
    assert ends(opened.engine.generate(requests, stream=True)) == found


@pytest.mark.slow
def test_options_reach_openvino(opened: Opened) -> None:
    engine = opened.engine
    (chosen,) = ends(engine.generate([ask("Is water wet?", constraint=Constraint("choice", ["yes", "no"]))]))
    assert chosen.text in ("yes", "no")
    schema = {"type": "object", "properties": {"n": {"type": "boolean"}}, "required": ["n"], "additionalProperties": False}
    (made,) = ends(engine.generate([ask("True?", constraint=Constraint("json_schema", schema), max_tokens=60)]))
    assert isinstance(json.loads(made.text)["n"], bool)
    drawn, again = (
        [done.token_ids for done in ends(engine.generate([ask("Say something.", temperature=1.0, seed=5, max_tokens=12)]))]
        for _ in range(2)
    )
    assert drawn == again
    many = ends(engine.generate([ask("Say something.", temperature=1.0, seed=5, n=3, max_tokens=12)]))
    assert [done.choice for done in many] == [0, 1, 2]
    assert len({done.text for done in many}) > 1
    (stopped,) = ends(engine.generate([ask("Count: one two three", stop=[" "], max_tokens=20)]))
    assert (" " in stopped.text, stopped.finish) == (False, "stop")
    (long,) = ends(engine.generate([ask("Hi", ignore_eos=True, max_tokens=60)]))
    assert (len(long.token_ids), long.finish) == (60, "length")
    with pytest.raises(RequestError, match="neither messages nor token ids"):
        list(engine.generate([Request(token_ids=[])]))


@pytest.fixture(scope="module", params=[{"lora_alpha": 12}, {"lora_alpha": 4, "use_rslora": True}], ids=["plain", "rslora"])
def adapter(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from swift_core.config import Component
    from swift_core.index import build_index
    from swift_core.models import resolve_model
    from swift_core.registry import Registry
    from transformers import AutoModelForCausalLM

    source = resolve_model(Registry(build_index()), Component("smollm2-135m-instruct")).source
    torch.manual_seed(0)
    targets = ["q_proj", "v_proj", "down_proj"]
    config = LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM", **request.param)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.03)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(str(folder))
    return folder


@pytest.mark.slow
def test_adapters_are_the_torch_engine_s(opened: Opened, adapter: Path) -> None:
    texts = ("Who are you?", "Name a colour.")
    with Session(load_config([], ["backend.precision=fp32"], {"model": "smollm2-135m-instruct"})) as ours:
        torch_engine = ours.opened().engine
        for engine in (torch_engine, opened.engine):
            engine.load_adapter("tried", adapter)
        requests = [ask(text, max_tokens=16, adapter=name) for text in texts for name in ("tried", None)]
        expected, found = ends(torch_engine.generate(requests)), ends(opened.engine.generate(requests))
        assert [(done.token_ids, done.text) for done in found] == [(done.token_ids, done.text) for done in expected]
        assert found[0].text != found[1].text, "the adapter changed nothing"
        for one, two in zip(expected, found, strict=True):
            assert two.logprobs == pytest.approx(one.logprobs, abs=1e-3)
        sequences = [done.token_ids for done in expected]
        for name in ("tried", None):
            pairs = zip(torch_engine.logprobs(sequences, name), opened.engine.logprobs(sequences, name), strict=True)
            for one_, two_ in pairs:
                assert two_ == pytest.approx(one_, abs=1e-3, rel=3e-4)
        likely: Any = opened.engine
        told, wanted = likely.likeliest(sequences[:1], 2)[0], torch_engine.likeliest(sequences[:1], 2)[0]  # type: ignore[attr-defined]
        assert [[token for token, _ in top] for top in told] == [[token for token, _ in top] for top in wanted]
    opened.engine.unload_adapter("tried")
    with pytest.raises(RequestError, match="adapter 'tried' is not loaded"):
        list(opened.engine.generate(requests))
    (still,) = ends(opened.engine.generate(requests[1:2]))
    assert still.token_ids == found[1].token_ids
