"""The engine sglang: what it sends and reads, against exchanges of its documented API, and the real server where CUDA is.

`exchanges.json` says where they come from: from documentation, not from a run.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from swift_core.config import load_config
from swift_core.errors import CapabilityError, RequestError
from swift_core.session import Session
from swift_core.types import Completion, Constraint, ModelFolder, Request
from swift_plugin_openai.environments import home, mark_of
from swift_plugin_sglang.config import SglangConfig
from swift_plugin_sglang.engine import SglangEngine

EXCHANGES = json.loads(Path(__file__).with_name("exchanges.json").read_text(encoding="utf-8"))["exchanges"]
TEMPLATE: Any = SimpleNamespace(
    prompt=lambda *args, **kwargs: [1], decode=lambda ids: bytes(i for i in ids if i > 9).decode(), stop_ids=lambda: [2]
)


class Replay(BaseHTTPRequestHandler):
    """Answers a body that stands in an exchange with what stands there; another is an error that shows it."""

    def log_message(self, *args: Any) -> None: ...

    def do_POST(self) -> None:
        sent = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if "lora_path" in sent and "lora_name" in sent:
            sent["lora_path"] = "FOLDER"
        found = next((e for e in EXCHANGES if (e["path"], e["sent"]) == (self.path, sent)), None)
        self.send_response(200 if found else 400)
        self.end_headers()
        if found is None:
            self.wfile.write(json.dumps({"error": {"message": f"no exchange has {self.path} {sent}"}}).encode())
        elif "events" in found:
            for event in [*map(json.dumps, found["events"]), "[DONE]"]:
                self.wfile.write(f"data: {event}\n\n".encode())
        else:
            self.wfile.write(json.dumps(found["answer"]).encode())


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SglangEngine]:
    """The engine with the replay in the place of its server."""
    (tmp_path / "python").touch()
    made = SglangEngine(ModelFolder("m", None, TEMPLATE), SglangConfig(python=str(tmp_path / "python")))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Replay)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    made.client.address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(made, "ready", lambda: None)
    yield made
    made.close()
    server.shutdown()


def one(found: Iterator[Completion]) -> Completion:
    (done,) = [done for done in found if done.finish]
    return done


def test_a_whole_answer(engine: SglangEngine) -> None:
    done = one(engine.generate([Request(token_ids=[5, 6], max_tokens=3, top_logprobs=2)]))
    assert (done.text, done.token_ids, done.finish, done.prompt_tokens) == ("ab", [97, 98, 2], "stop", 2)
    assert done.logprobs == [-0.1, -0.2, -0.3]
    assert done.top_logprobs == [[(97, -0.1), (7, -2.5)], [(98, -0.2), (8, -3.0)], [(2, -0.3), (9, -3.5)]]


def test_log_probabilities_of_a_sequence(engine: SglangEngine) -> None:
    assert engine.logprobs([[5, 6, 7], [5]]) == [[-1.5, -0.5], []]


def test_an_exchange_that_is_not_there_is_an_error(engine: SglangEngine) -> None:
    with pytest.raises(RequestError, match="no exchange has /generate"):
        list(engine.generate([Request(token_ids=[5, 6], max_tokens=4)]))


def test_without_its_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIFT_CACHE", str(tmp_path))
    with pytest.raises(RequestError, match="Make it: swift-core backends install sglang --cuda"):
        SglangEngine(ModelFolder("m", None, TEMPLATE), SglangConfig())
    with pytest.raises(ValueError, match="memory_share"):
        SglangConfig(memory_share=1.0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs a CUDA GPU")
def test_tokens_are_the_torch_engine_s() -> None:
    if mark_of("sglang") is None:
        pytest.skip(f"{home('sglang')} is not there: swift-core backends install sglang --cuda")
    asked = [Request([{"role": "user", "content": text}], max_tokens=16) for text in ("Who are you?", "Name a colour.")]
    found: dict[str, Any] = {}
    for name, options in (("transformers", []), ("sglang", [])):
        with Session(load_config([], options, {"engine": name, "model": "smollm2-135m-instruct"})) as session:
            opened = session.opened()
            done = sorted((d for d in opened.engine.generate(asked) if d.finish), key=lambda d: d.index)
            found[name] = done, opened.engine.logprobs([d.token_ids for d in done])
    ours, theirs = found["transformers"], found["sglang"]
    for one_, two in zip(ours[0], theirs[0], strict=True):
        assert one_.token_ids[0] == two.token_ids[0]
        assert two.logprobs[0] == pytest.approx(one_.logprobs[0], abs=5e-2)  # bf16


def adapter(folder: Path) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    (folder / "adapter_model.safetensors").touch()
    return folder


def test_a_stream_with_adapter_seed_and_constraint(
    engine: SglangEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(engine.server), "running", property(lambda self: True))
    engine.load_adapter("a", adapter(tmp_path / "a"))
    asked = Request(
        token_ids=[5, 6, 7],
        max_tokens=2,
        temperature=1.0,
        top_k=20,
        seed=3,
        adapter="a",
        constraint=Constraint("regex", "[a-c]+"),
    )
    found = list(engine.generate([asked], stream=True))
    assert [(piece.text, piece.token_ids, piece.logprobs) for piece in found[:-1]] == [
        ("a", [97], [-0.5]),
        ("c", [99], [-0.25]),
    ]
    assert (found[-1].text, found[-1].token_ids, found[-1].finish) == ("ac", [97, 99], "length")
    engine.unload_adapter("a")
    monkeypatch.undo()
    with pytest.raises(CapabilityError, match="no Lark grammar"):
        list(engine.generate([Request(token_ids=[5], constraint=Constraint("grammar", "start: /a/"))]))


def test_command(engine: SglangEngine) -> None:
    words = engine.command(99)
    assert words[2:4] == ["-m", "sglang.launch_server"]
    assert words[words.index("--port") + 1] == "99"
    assert words[words.index("--host") + 1] == "127.0.0.1"
    assert words[words.index("--model-path") + 1] == str(Path("m").absolute())
