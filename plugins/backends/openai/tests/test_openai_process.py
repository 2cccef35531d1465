"""Engines in a process of their own, with a toy for the library: start, death, restart, adapters, stop strings, cancelling."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from swift_core.errors import CapabilityError, RequestError, RunError
from swift_core.types import Completion, Constraint, ModelFolder, Request
from swift_plugin_openai.process_config import ProcessConfig
from swift_plugin_openai.worker import WorkerEngine

BACKEND = Path(__file__).with_name("toy_backend.py")
TEMPLATE: Any = SimpleNamespace(
    prompt=lambda messages, tools=None, **kwargs: list(messages[-1]["content"].encode()),
    decode=lambda ids: bytes(ids).decode("utf-8", "replace"),
    stop_ids=lambda: [ord("z")],
)


class Toy(WorkerEngine):
    name = "toy"
    backend = BACKEND
    capabilities = frozenset({"stream", "concurrent", "adapters"})
    lacks = ("logit_bias", "min_p")

    def __init__(self, config: ProcessConfig, adapter: Path | None = None, **options: Any) -> None:
        self.opened_with = options
        super().__init__(ModelFolder("nowhere", None, TEMPLATE, adapter=adapter), config, sys.executable)

    def settings(self) -> dict[str, Any]:
        return self.opened_with


@pytest.fixture
def make() -> Iterator[Callable[..., Toy]]:
    made: list[Toy] = []

    def make(adapter: Path | None = None, start_timeout: float = 30.0, **options: Any) -> Toy:
        made.append(Toy(ProcessConfig(start_timeout=start_timeout), adapter, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def adapter(folder: Path, step: int, **config: Any) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, **config}))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    (folder / "step").write_text(str(step))
    return folder


def ends(found: Iterator[Completion]) -> list[Completion]:
    return sorted((done for done in found if done.finish), key=lambda done: (done.index, done.choice))


def gone(pids: list[int], seconds: float = 10.0) -> bool:
    """Whether all of these processes end in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.05)
    return False


def test_answers_streamed_and_whole(make: Callable[..., Toy]) -> None:
    engine = make()
    requests = [Request(token_ids=[96], max_tokens=3), Request([{"role": "user", "content": "v"}], max_tokens=9)]
    first, second = ends(engine.generate(requests))
    assert (first.text, first.token_ids, first.finish, first.prompt_tokens) == ("abc", [97, 98, 99], "length", 1)
    assert first.logprobs == [-97 / 256, -98 / 256, -99 / 256]
    assert (second.text, second.finish) == ("wxyz", "stop")
    found = list(engine.generate(requests, stream=True))
    assert ends(iter(found)) == [first, second]
    assert [piece.text for piece in found if piece.index == 0 and not piece.finish] == ["a", "b", "c"]
    assert engine.server.starts == 1
    many = ends(engine.generate([Request(token_ids=[96], max_tokens=2, n=3)]))
    assert [(done.choice, done.text) for done in many] == [(0, "ab"), (1, "ab"), (2, "ab")]


def test_stop_strings_end_the_answer_and_are_not_shown(make: Callable[..., Toy]) -> None:
    engine = make(delay=0.01)
    request = Request(token_ids=[96], max_tokens=250, stop=["fg", "nope"], ignore_eos=True)
    (done,) = ends(engine.generate([request]))
    assert (done.text, done.finish, bytes(done.token_ids)) == ("abcde", "stop", b"abcdefg")
    found = list(engine.generate([request], stream=True))
    assert "".join(piece.text for piece in found if not piece.finish) == "abcde"
    assert ends(iter(found)) == [done]


def test_a_character_of_several_tokens_is_shown_whole(make: Callable[..., Toy]) -> None:
    found = list(make().generate([Request(token_ids=[0xC2], max_tokens=2)], stream=True))  # c3 c4: two broken beginnings
    assert "".join(piece.text for piece in found if not piece.finish) == ""
    assert ends(iter(found))[0].text == "\ufffd\ufffd"


def test_scores(make: Callable[..., Toy], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    engine = make()
    assert engine.logprobs([[1, 64, 128], [5], [2, 32]]) == [[-0.25, -0.5], [], [-0.125]]
    assert engine.logprobs([[99, 1]]) == [[0.0]], "our PYTHONPATH reached the process"


def test_a_refused_request_does_not_touch_the_others(make: Callable[..., Toy]) -> None:
    engine = make()
    with pytest.raises(RequestError, match=r"engine toy refused the request \(400: ValueError: seven is refused\)"):
        list(engine.generate([Request(token_ids=[7])]))
    assert ends(engine.generate([Request(token_ids=[96], max_tokens=1)]))[0].text == "a"
    assert engine.server.starts == 1


@pytest.mark.parametrize("stream", [False, True])
def test_killed_while_it_answers_it_says_so_and_starts_again(make: Callable[..., Toy], stream: bool) -> None:
    engine = make(delay=0.02)
    requests = [Request(token_ids=[96], max_tokens=10_000, ignore_eos=True)] * 2
    found = engine.generate(requests, stream=True)
    assert next(found).text == "a"
    pids = engine.server.pids()
    os.kill(pids[0], signal.SIGKILL)
    with pytest.raises(
        RunError, match=r"engine toy's process was ended by signal 9 while it answered; the next request starts it"
    ):
        list(found)
    assert gone(pids)
    with pytest.warns(UserWarning, match="engine toy: its process was ended by signal 9, and is started again"):
        assert ends(engine.generate([Request(token_ids=[96], max_tokens=2)], stream))[0].text == "ab"
    assert engine.server.starts == 2
    with pytest.raises(RunError, match="ended with exit code 9 while it answered"):
        list(engine.generate([Request(token_ids=[8])], stream))
    assert ends(engine.generate([Request(token_ids=[96], max_tokens=2)], stream))[0].text == "ab"


def test_what_does_not_start_shows_its_log(make: Callable[..., Toy]) -> None:
    with pytest.raises(RunError, match=r"engine toy did not start: its process ended with exit code 3\. .*the toy is broken"):
        list(make(fails=True).generate([Request(token_ids=[1])]))
    server = make(fails=True).server
    server.log.write_text("ERROR of an earlier start\n")
    with pytest.raises(RunError) as caught:
        server.ensure()
    assert "earlier" not in str(caught.value)
    server.log.write_text("".join(f"{line}\n" for line in ["ValueError: no such thing", *(f"leaked {n}" for n in range(20))]))
    server._logged = 0
    assert server.tail() == "ValueError: no such thing"
    engine = make(start_timeout=1.0, slow_start=30)
    with pytest.raises(RunError, match=r"did not start in 1 seconds \(engine.start_timeout\)"):
        list(engine.generate([Request(token_ids=[1])]))
    assert engine.server.pids() == []


def test_closing_an_iterator_cancels_and_closing_the_engine_ends_the_process(make: Callable[..., Toy]) -> None:
    engine = make(delay=0.01)
    found = engine.generate([Request(token_ids=[96], max_tokens=10_000, ignore_eos=True)], stream=True)
    next(found)
    found.close()
    assert engine._users.total() == 0
    pids = engine.server.pids()
    assert pids
    engine.close()
    assert gone(pids)
    assert not engine.server.folder.exists()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_its_parent(how: signal.Signals) -> None:
    script = f"""
        import sys, time
        sys.path.insert(0, {str(BACKEND.parent)!r})
        from test_openai_process import Toy, ProcessConfig, Request
        engine = Toy(ProcessConfig())
        list(engine.generate([Request(token_ids=[96], max_tokens=1)]))
        print(*engine.server.pids(), flush=True)
        time.sleep(60)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert pids
    parent.send_signal(how)
    parent.wait(10)
    assert gone(pids)


def test_adapters(make: Callable[..., Toy], tmp_path: Path) -> None:
    engine = make()
    two, three = adapter(tmp_path / "two", 2), adapter(tmp_path / "three", 3)
    engine.load_adapter("early", two)
    asked = [Request(token_ids=[96], max_tokens=2, adapter=name) for name in (None, "early")]
    assert [done.text for done in ends(engine.generate(asked))] == ["ab", "bd"]
    engine.load_adapter("late", three)  # while it runs
    assert ends(engine.generate([Request(token_ids=[96], max_tokens=2, adapter="late")]))[0].text == "cf"
    assert engine.logprobs([[1, 64]], "early") == [[-0.5]]
    os.kill(engine.server.pids()[0], signal.SIGKILL)
    assert gone(engine.server.pids())
    assert [done.text for done in ends(engine.generate(asked))] == ["ab", "bd"]  # those loaded come back
    engine.unload_adapter("early")
    with pytest.raises(RequestError, match="adapter 'early' is not loaded; loaded: late"):
        list(engine.generate(asked))
    with pytest.raises(RequestError, match="adapter 'early' is not loaded; loaded: late"):
        engine.unload_adapter("early")
    with pytest.raises(RequestError, match=r"adapter .*bad cannot be loaded: .*it does not fit"):
        engine.load_adapter("bad", adapter(tmp_path / "bad", 1))


def test_a_folder_s_own_adapter_is_on(make: Callable[..., Toy], tmp_path: Path) -> None:
    engine = make(adapter(tmp_path / "own", 4))
    assert ends(engine.generate([Request(token_ids=[96], max_tokens=2)]))[0].text == "dh"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "is of type IA3; engine toy serves LORA; merge it first: swift-core export"),
        ({"init_lora_weights": "pissa_niter_4"}, r"\(pissa_niter_4\) holds a part of the base's weights; merge it first"),
        ({"use_dora": True}, "has use_dora, which engine toy does not serve"),
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save, which engine toy does not serve"),
        ({"bias": "all"}, "has trained biases"),
    ],
)
def test_adapters_that_would_be_another_model_are_refused(
    make: Callable[..., Toy], tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        make().load_adapter("a", adapter(tmp_path / "a", 1, **config))
    with pytest.raises(RequestError, match=r"adapter_config\.json cannot be read"):
        make().load_adapter("a", tmp_path)


def test_what_it_lacks(make: Callable[..., Toy]) -> None:
    engine = make()
    for request, message in (
        (Request(token_ids=[1], logit_bias={1: 1.0}), "engine toy has no logit_bias"),
        (Request(token_ids=[1], min_p=0.5), "engine toy has no min_p"),
        (Request(token_ids=[1], constraint=Constraint("json_object")), r"engine toy has no constraints \(json_object\)"),
        (Request(token_ids=[1], media={"images": ["a"]}), "takes text only"),
    ):
        with pytest.raises(CapabilityError, match=message):
            list(engine.generate([request]))
    with pytest.raises(RequestError, match="neither messages nor token ids"):
        list(engine.generate([Request(token_ids=[])]))
    for call in (
        lambda: engine.embed([[1]]),
        lambda: engine.score([[1]]),
        lambda: engine.sync_weights(iter(()), 1),
        engine.sleep,
    ):
        with pytest.raises(CapabilityError):
            call()
    assert engine.server.starts == 0


def test_the_likeliest_of_a_prompt(make: Callable[..., Toy]) -> None:
    engine = make()
    assert engine.likeliest([[1, 64, 128], [5]], 2) == [[[(0, 0.0), (1, -1 / 256)]] * 2, []]


def test_an_adapter_is_replaced_once_the_new_one_is_there(make: Callable[..., Toy], tmp_path: Path) -> None:
    engine = make(delay=0.02)
    asked = Request(token_ids=[96], max_tokens=3, adapter="a")
    engine.load_adapter("a", adapter(tmp_path / "two", 2))
    under_way = engine.generate([replace(asked, max_tokens=20)], stream=True)
    assert next(under_way).text == "b"
    with pytest.raises(RequestError, match="it does not fit"):
        engine.load_adapter("a", adapter(tmp_path / "bad", 1))
    assert ends(engine.generate([asked]))[0].text == "bdf"  # the one before stays
    replacing = threading.Thread(target=engine.load_adapter, args=("a", adapter(tmp_path / "three", 3)))
    replacing.start()
    while "three" not in str(engine.adapters["a"]):
        time.sleep(0.01)
    assert ends(engine.generate([asked]))[0].text == "cfi"
    assert ends(under_way)[0].text.startswith("bdfhj")  # it is answered by the adapter that it began with
    replacing.join(10)
    assert not replacing.is_alive()
    assert ends(engine.generate([asked]))[0].text == "cfi"
