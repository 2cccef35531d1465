"""Servers for the tests: a real process with a tiny model, and one in this process over an engine that does as it is told."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from swift_core.errors import RequestError
from swift_core.session import Opened
from swift_core.types import AnswerDelta, Completion, Request
from swift_plugin_serve.app import make_app
from swift_plugin_serve.served import Served
from swift_plugin_serve.settings import Settings
from swift_plugin_transformers.testing import make_tokenizer, save_tiny


@dataclass
class Process:
    """A `swift-core serve` process."""

    popen: subprocess.Popen[bytes]
    log: Path
    url: str

    def events(self, kind: str) -> list[dict[str, Any]]:
        lines = [line for line in self.log.read_text(encoding="utf-8").splitlines() if line.startswith("{")]
        return [found for found in map(json.loads, lines) if found["event"] == kind]

    def end(self, timeout: float = 60) -> int:
        self.popen.send_signal(signal.SIGTERM)
        return self.popen.wait(timeout)


@contextmanager
def serving(log: Path, *arguments: object, **environment: str) -> Iterator[Process]:
    """Start `swift-core serve --port 0 ARGUMENTS`, and end it."""
    command = [sys.executable, "-m", "swift_core.cli.main", "serve", "--port", "0", *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    with log.open("wb") as file:
        popen = subprocess.Popen(command, stderr=file, stdout=file, env=env)
    process = Process(popen, log, "")
    try:
        until = time.monotonic() + 180
        while not (told := process.events("listening")):
            assert popen.poll() is None, f"it ended:\n{log.read_text()}"
            assert time.monotonic() < until, f"not listening:\n{log.read_text()}"
            time.sleep(0.1)
        process.url = told[0]["url"]
        yield process
    finally:
        popen.kill()
        popen.wait(30)


@pytest.fixture(scope="session")
def sharp_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that is sure of what it says, so that greedy answers are the same everywhere."""
    return save_tiny(tmp_path_factory.mktemp("serve") / "tiny", initializer_range=0.3)


@pytest.fixture(scope="session")
def served(sharp_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A server with the tiny model, in a process of its own."""
    with serving(tmp_path_factory.mktemp("log") / "serve.log", "--model", sharp_folder, "--page") as process:
        yield process


# --- an engine that does as it is told --------------------------------------------------------------------------------


@dataclass
class Scripted:
    """Says what `script(request)` gives, a piece a text. A piece may be an exception, or seconds to wait."""

    script: Callable[[Request], Sequence[Any]]
    capabilities: frozenset[str] = frozenset({"stream", "concurrent", "adapters", "constraint"})
    seen: list[Request] = field(default_factory=list)
    active: int = 0
    most: int = 0
    closed: int = 0
    adapters: dict[str, Path] = field(default_factory=dict)
    lock: Any = field(default_factory=threading.Lock)

    def generate(self, requests: Sequence[Request], stream: bool = False) -> Iterator[Completion]:
        with self.lock:
            self.seen += requests
            self.active += 1
            self.most = max(self.most, self.active)
        whole = False
        try:
            for index, request in enumerate(requests):
                for choice in range(request.n):
                    text, ids = "", list[int]()
                    for piece in self.script(request):
                        if isinstance(piece, BaseException):
                            raise piece
                        if isinstance(piece, float):
                            time.sleep(piece)
                            continue
                        new = [byte + 3 for byte in piece.encode()]  # ids need only be as many as in a real answer
                        text, ids = text + piece, ids + new
                        yield Completion(index, piece, new, [-0.5] * len(new), choice=choice)
                    finish = "length" if len(ids) >= request.max_tokens else "stop"
                    scores = [-0.5] * len(ids)
                    yield Completion(index, text, ids, scores, finish, 7, choice=choice, cached_tokens=3, drafted=4, accepted=2)
            whole = True
        finally:
            with self.lock:
                self.active -= 1
                self.closed += not whole

    def logprobs(self, sequences: Sequence[Sequence[int]], adapter: str | None = None) -> list[list[float]]:
        return [[-0.25] * (len(ids) - 1) for ids in sequences]

    def embed(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return [[3.0, 4.0, 0.0] for _ in sequences]

    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        return [float(len(ids)) for ids in sequences]

    def load_adapter(self, name: str, folder: Path) -> None:
        if (folder / "broken").exists():
            raise RequestError(f"adapter {folder} cannot be loaded: it is broken")
        self.adapters[name] = folder

    def unload_adapter(self, name: str) -> None:
        del self.adapters[name]

    def close(self) -> None: ...


class SpokenTemplate:
    """A template whose answers have marks that can be seen: `<think>...</think>` and `<call>NAME ARGUMENTS</call>`."""

    def __init__(self) -> None:
        self.tokenizer = make_tokenizer()

    def prompt(self, messages: list[Any], tools: Any = None, **kwargs: Any) -> list[int]:
        if kwargs.get("refuse"):
            raise ValueError("the chat template refuses this")
        return list(self.tokenizer(json.dumps(messages))["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token - 3 for token in ids).decode(errors="replace")

    def reader(self, prompt: Sequence[int], tools: Any = None) -> SpokenReader:
        return SpokenReader(self, bool(tools))

    def call_grammar(self, tools: list[Any], name: str | None, many: bool, prompt: Sequence[int]) -> str:
        return f"call {name or [tool['function']['name'] for tool in tools]} {'many' if many else 'one'}"


class SpokenReader:
    """Reads whole answers: what is between marks is given in two pieces."""

    def __init__(self, template: SpokenTemplate, tools: bool) -> None:
        self.template, self.tools, self.text, self.calls = template, tools, "", 0

    def feed(self, ids: Sequence[int]) -> list[AnswerDelta]:
        self.text += self.template.decode(ids)
        found: list[AnswerDelta] = []
        while True:
            if self.text.startswith("<think>") and "</think>" in self.text:
                inside, _, self.text = self.text[7:].partition("</think>")
                found += [AnswerDelta(reasoning=inside[:2]), AnswerDelta(reasoning=inside[2:])]
            elif self.tools and self.text.startswith("<call>") and "</call>" in self.text:
                inside, _, self.text = self.text[6:].partition("</call>")
                name, _, arguments = inside.partition(" ")
                found += [AnswerDelta(call=self.calls, name=name), AnswerDelta(call=self.calls, arguments=arguments)]
                self.calls += 1
            elif self.text and not "<think>".startswith(self.text[:7]) and self.text[:6] != "<call>"[: len(self.text)]:
                found.append(AnswerDelta(content=self.text[0]))
                self.text = self.text[1:]
            else:
                return found

    def close(self) -> list[AnswerDelta]:
        return [AnswerDelta(content=self.text)] if self.text else []


@dataclass
class Local:
    """A server in a thread of this process."""

    url: str
    engine: Any
    state: Served
    client: httpx.Client

    def chat(self, **body: Any) -> httpx.Response:
        whole = {"model": "scripted", "messages": [{"role": "user", "content": "Hi"}], **body}
        return self.client.post("/v1/chat/completions", json=whole)

    def until(self, condition: Callable[[], Any], timeout: float = 10) -> None:
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, "not seen in time"
            time.sleep(0.01)


@contextmanager
def local(engine: Any, template: Any = None, processor: Any = None, ref: Any = None, **settings: Any) -> Iterator[Local]:
    """Serve an engine of the test's own."""
    state = Served(Opened("scripted", engine, template, ref), Settings(**{"name": "scripted", **settings}), processor)
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_app(state), log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    while not server.started:
        time.sleep(0.01)
    try:
        with httpx.Client(base_url=url, timeout=30) as client:
            yield Local(url, engine, state, client)
    finally:
        server.should_exit = server.force_exit = True
        thread.join(20)


@pytest.fixture
def spoken() -> SpokenTemplate:
    return SpokenTemplate()


@pytest.fixture(scope="session")
def start() -> Callable[..., Any]:
    """`with start(engine, **settings) as server`."""
    return local


@pytest.fixture(scope="session")
def start_process() -> Callable[..., Any]:
    return serving


@pytest.fixture(scope="session")
def scripted() -> type[Scripted]:
    return Scripted
