"""Tests that engines with an API of their own share: what they send and read, replayed from exchanges that are written down.

A plugin's test class inherits `ReplayContract` and names its classes and its file of exchanges.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from swift_core.config import load_config
from swift_core.errors import RequestError
from swift_core.session import Session
from swift_core.types import Completion, ModelFolder, Request

from swift_plugin_openai.environments import home, mark_of

TEMPLATE: Any = SimpleNamespace(
    prompt=lambda *args, **kwargs: [1], decode=lambda ids: bytes(i for i in ids if i > 9).decode(), stop_ids=lambda: [2]
)


class Replay(BaseHTTPRequestHandler):
    """Answers a body that stands in an exchange with what stands there; another is an error that shows it."""

    exchanges: ClassVar[list[dict[str, Any]]] = []

    def log_message(self, *args: Any) -> None: ...

    def do_POST(self) -> None:
        sent = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if "lora_path" in sent and "lora_name" in sent:
            sent["lora_path"] = "FOLDER"
        found = next((e for e in self.exchanges if (e["path"], e["sent"]) == (self.path, sent)), None)
        self.send_response(200 if found else 400)
        self.end_headers()
        if found is None:
            self.wfile.write(json.dumps({"error": {"message": f"no exchange has {self.path} {sent}"}}).encode())
        elif "events" in found:
            for event in [*map(json.dumps, found["events"]), "[DONE]"]:
                self.wfile.write(f"data: {event}\n\n".encode())
        else:
            self.wfile.write(json.dumps(found["answer"]).encode())


def one(found: Iterator[Completion]) -> Completion:
    (done,) = [done for done in found if done.finish]
    return done


class ReplayContract:
    """engine_class, config_class: of the plugin. exchanges: a JSON file, `{"exchanges": [{path, sent, answer or events}]}`."""

    engine_class: ClassVar[Any]
    config_class: ClassVar[Any]
    exchanges: ClassVar[Path]

    @pytest.fixture
    def engine(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
        """The engine with the replay in the place of its server."""
        (tmp_path / "python").touch()
        made = self.engine_class(ModelFolder("m", None, TEMPLATE), self.config_class(python=str(tmp_path / "python")))
        known = json.loads(self.exchanges.read_text(encoding="utf-8"))["exchanges"]
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Known", (Replay,), {"exchanges": known}))
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        made.client.address = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr(made, "ready", lambda: None)
        yield made
        made.close()
        server.shutdown()

    def test_a_whole_answer(self, engine: Any) -> None:
        done = one(engine.generate([Request(token_ids=[5, 6], max_tokens=3, top_logprobs=2)]))
        assert (done.text, done.token_ids, done.finish, done.prompt_tokens) == ("ab", [97, 98, 2], "stop", 2)
        assert done.logprobs == [-0.1, -0.2, -0.3]
        assert done.top_logprobs == [[(97, -0.1), (7, -2.5)], [(98, -0.2), (8, -3.0)], [(2, -0.3), (9, -3.5)]]

    def test_log_probabilities_of_a_sequence(self, engine: Any) -> None:
        assert engine.logprobs([[5, 6, 7], [5]]) == [[-1.5, -0.5], []]

    def test_an_exchange_that_is_not_there_is_an_error(self, engine: Any) -> None:
        with pytest.raises(RequestError, match="no exchange has /generate"):
            list(engine.generate([Request(token_ids=[5, 6], max_tokens=4)]))

    def test_without_its_environment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SWIFT_CACHE", str(tmp_path))
        with pytest.raises(RequestError, match=f"Make it: swift-core backends install {self.engine_class.name} --cuda"):
            self.engine_class(ModelFolder("m", None, TEMPLATE), self.config_class())
        with pytest.raises(ValueError, match="memory_share"):
            self.config_class(memory_share=1.0)

    @pytest.mark.slow
    @pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs a CUDA GPU")
    def test_tokens_are_the_torch_engine_s(self) -> None:
        name = self.engine_class.name
        if mark_of(name) is None:
            pytest.skip(f"{home(name)} is not there: swift-core backends install {name} --cuda")
        asked = [Request([{"role": "user", "content": text}], max_tokens=16) for text in ("Who are you?", "Name a colour.")]
        found: dict[str, Any] = {}
        for engine in ("transformers", name):
            with Session(load_config([], [], {"engine": engine, "model": "smollm2-135m-instruct"})) as session:
                opened = session.opened()
                done = sorted((d for d in opened.engine.generate(asked) if d.finish), key=lambda d: d.index)
                found[engine] = done, opened.engine.logprobs([d.token_ids for d in done])
        for ours, theirs in zip(found["transformers"][0], found[name][0], strict=True):
            assert ours.token_ids[0] == theirs.token_ids[0]
            assert theirs.logprobs[0] == pytest.approx(ours.logprobs[0], abs=5e-2)  # bf16
