"""Weights that come while an engine in a process of its own runs: which version answers, and what stays when one fails."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from swift_core.errors import CapabilityError, RequestError, RunError
from swift_core.types import ModelFolder, Request
from swift_plugin_openai.process_config import ProcessConfig
from swift_plugin_openai.weights import INDEX, Folders, write
from swift_plugin_openai.worker import WorkerEngine
from test_openai_process import BACKEND, TEMPLATE, ends

ASKED = Request(token_ids=[96], max_tokens=2)
LONG = Request(token_ids=[0], max_tokens=60, ignore_eos=True)


def checkpoint(folder: Path, step: int) -> Path:
    """A checkpoint of the toy's: two files, one weight in each."""
    folder.mkdir()
    (folder / "config.json").write_text('{"tie_word_embeddings": true}')
    save_file({"step": torch.tensor([step])}, folder / "one.safetensors")
    save_file({"other": torch.arange(6.0).reshape(2, 3)}, folder / "two.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"step": "one.safetensors", "other": "two.safetensors"}}))
    return folder


class Synced(WorkerEngine):
    """The toy, whose weight `step` may change. `meddle` is called before the server is told."""

    name = "toy"
    backend = BACKEND
    capabilities = frozenset({"stream", "concurrent", "sync"})
    meddle: Callable[[Path], None] | None = None

    def __init__(self, folder: Path, **options: Any) -> None:
        self.opened_with = options
        super().__init__(ModelFolder(str(folder), None, TEMPLATE), ProcessConfig(), sys.executable)

    def settings(self) -> dict[str, Any]:
        return {"folder": str(self.current), **self.opened_with}

    async def post_weights(self, folder: Path) -> None:
        if self.meddle is not None:
            meddle, self.meddle = self.meddle, None
            meddle(folder)
        await self.client.tell("/v1/load_lora_adapter", {"lora_name": "base", "lora_path": str(folder)})


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Synced]]:
    made: list[Synced] = []

    def make(**options: Any) -> Synced:
        made.append(Synced(checkpoint(tmp_path / f"checkpoint-{len(made)}", 1), **options))
        return made[-1]

    yield make
    for engine in made:
        engine.close()
        assert engine.folders._root is None or not engine.folders._root.exists()


def stepped(step: int) -> Iterator[tuple[str, Any]]:
    return iter({"step": torch.tensor([step])}.items())


def said(engine: Synced) -> tuple[str, int]:
    (done,) = ends(engine.generate([ASKED]))
    return done.text, done.weight_version


def test_new_weights_answer_with_their_version(make: Callable[..., Synced]) -> None:
    engine = make()
    assert said(engine) == ("ab", 0)
    engine.sync_weights(stepped(2), 5)
    assert said(engine) == ("bd", 5)
    engine.sync_weights(stepped(3), 6)
    assert said(engine) == ("cf", 6)
    assert [piece.weight_version for piece in engine.generate([ASKED], stream=True)] == [6, 6, 6]
    assert engine.server.starts == 1
    assert len(list(engine.folders.root.iterdir())) == 1, "folders that are out of service are left"
    assert load_file(engine.current / "model-00001.safetensors")["other"].tolist() == [[0, 1, 2], [3, 4, 5]]
    os.kill(engine.server.pids()[0], signal.SIGKILL)
    assert engine.server.ended(10) is not None
    assert said(engine) == ("cf", 6), "a server that is started again has other weights"


def test_weights_before_the_first_request(make: Callable[..., Synced]) -> None:
    engine = make()
    engine.sync_weights(stepped(4), 2)
    assert (said(engine), engine.server.starts) == (("dh", 2), 1)


def test_what_is_under_way_is_finished_by_the_weights_before(make: Callable[..., Synced]) -> None:
    engine = make(delay=0.02)
    found = engine.generate([LONG], stream=True)
    assert next(found).token_ids == [1]
    syncing = threading.Thread(target=engine.sync_weights, args=(stepped(2), 1))
    syncing.start()
    while not engine.folders.root.exists() or not engine.gate._turn.locked():
        time.sleep(0.01)
    assert said(engine) == ("bd", 1)  # it came meanwhile, and waited
    (done,) = ends(found)
    assert (done.token_ids, done.weight_version) == (list(range(1, 61)), 0)
    syncing.join(10)
    assert not syncing.is_alive()


def dying() -> Iterator[tuple[str, Any]]:
    yield "other", torch.zeros(2, 3)
    raise OSError("the trainer is gone")


@pytest.mark.parametrize(
    ("weights", "kind", "message"),
    [
        (dying, RunError, "the trainer is gone"),
        (
            lambda: iter([("stop", torch.zeros(1))]),
            RequestError,
            "weight 'stop' is not one of the checkpoint's, step for example",
        ),
        (lambda: iter([("step", torch.zeros(2))]), RequestError, r"has shape \[2\], and the checkpoint's has \[1\]"),
        (lambda: iter([("step", torch.ones(1))] * 2), RequestError, "weight 'step' came twice"),
        (
            lambda: iter([("q.lora_A.default.weight", torch.ones(1))]),
            RequestError,
            "weights of an adapter came, and the engine",
        ),
    ],
)
def test_weights_that_do_not_come_whole(
    make: Callable[..., Synced], weights: Callable[[], Any], kind: type[Exception], message: str
) -> None:
    engine = make()
    engine.sync_weights(stepped(2), 7)
    with pytest.raises(kind, match=f"engine toy: weights of version 8 were not taken, 7 stays in service: .*{message}"):
        engine.sync_weights(weights(), 8)
    assert said(engine) == ("bd", 7)
    assert len(list(engine.folders.root.iterdir())) == 1


def broken(folder: Path) -> None:
    (folder / INDEX).write_text("{}")


def test_what_the_server_does_not_take_leaves_the_version_before(make: Callable[..., Synced]) -> None:
    engine = make()
    engine.sync_weights(stepped(2), 1)
    assert said(engine) == ("bd", 1)
    engine.meddle = broken
    with pytest.raises(RunError, match=r"weights of version 2 were not taken, 1 stays in service: .*KeyError: 'weight_map'"):
        engine.sync_weights(stepped(3), 2)
    assert (said(engine), engine.server.starts) == (("bd", 1), 1)


def test_killed_while_it_loads_the_version_before_comes_back(make: Callable[..., Synced]) -> None:
    engine = make()
    engine.sync_weights(stepped(2), 1)
    assert said(engine) == ("bd", 1)
    engine.meddle = lambda folder: os.kill(engine.server.pids()[0], signal.SIGKILL)
    with pytest.raises(RunError, match="weights of version 2 were not taken, 1 stays in service"):
        engine.sync_weights(stepped(3), 2)
    assert (said(engine), engine.server.starts) == (("bd", 1), 2)
    engine.sync_weights(stepped(3), 3)
    assert said(engine) == ("cf", 3)


def test_an_engine_without_it_says_so(tmp_path: Path) -> None:
    class Other(Synced):
        capabilities = frozenset({"stream"})

    engine = Other(checkpoint(tmp_path / "c", 1))
    with pytest.raises(
        CapabilityError, match="engine toy cannot take weights while it runs; engines transformers and vllm can"
    ):
        engine.sync_weights(stepped(2), 1)
    engine.close()


# --- folders of a peft model's weights --------------------------------------------------------------------------------

NAMED = "base_model.model.layer.q_proj.lora_{}.weight"


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    save_file({NAMED.format("A"): torch.ones(2, 3), NAMED.format("B"): torch.ones(3, 2)}, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def folders() -> Iterator[Folders]:
    made = Folders("toy")
    yield made
    made.close()


def test_weights_of_a_peft_model(tmp_path: Path, lora: Path, folders: Folders) -> None:
    model = checkpoint(tmp_path / "m", 1)
    peft = {
        "base_model.model.step": torch.tensor([1]), "base_model.model.other.base_layer.weight": torch.zeros(2, 3),
        "base_model.model.layer.q_proj.lora_A.policy.weight": torch.full((2, 3), 2.0),
        "base_model.model.layer.q_proj.lora_B.policy.weight": torch.full((3, 2), 3.0),
    }  # fmt: skip
    with pytest.raises(RequestError, match=r"weight 'other\.weight' is not one of the checkpoint's"):
        write(iter(peft.items()), model, lora, folders)
    assert list(folders.root.iterdir()) == []
    del peft["base_model.model.other.base_layer.weight"]
    made = write(iter(peft.items()), model, lora, folders)
    assert made.model is None, "the base did not change"
    assert made.adapter is not None
    found = load_file(made.adapter / "adapter_model.safetensors")
    assert {name: tensor.unique().tolist() for name, tensor in found.items()} == {
        NAMED.format("A"): [2.0], NAMED.format("B"): [3.0],
    }  # fmt: skip
    assert json.loads((made.adapter / "adapter_config.json").read_text())["r"] == 2
    peft["base_model.model.step"] += 1
    assert write(iter(peft.items()), model, lora, folders).model is not None


def test_an_adapter_that_does_not_come_whole(tmp_path: Path, lora: Path, folders: Folders) -> None:
    model = checkpoint(tmp_path / "m", 1)
    for tensor, message in (
        (torch.ones(2, 3), r"did not come whole: .*lora_B\.weight and 0 others lack"),
        (torch.ones(4, 3), r"has shape \[4, 3\], and the adapter's has shape \[2, 3\]"),
    ):
        with pytest.raises(RequestError, match=message):
            write(iter({NAMED.format("A"): tensor}.items()), model, lora, folders)


def test_large_weights_stand_in_several_files(tmp_path: Path, folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swift_plugin_openai.weights.SHARD", 8)
    made = write(stepped(9), checkpoint(tmp_path / "m", 1), None, folders)
    assert made.model is not None
    places = json.loads((made.model / INDEX).read_text())["weight_map"]
    assert places == {"step": "model-00001.safetensors", "other": "model-00002.safetensors"}
    assert load_file(made.model / "model-00001.safetensors")["step"].tolist() == [9]
    tied = iter({"lm_head.weight": torch.ones(1), "step": torch.tensor([2])}.items())
    assert write(tied, checkpoint(tmp_path / "n", 1), None, folders).model is not None


def test_folders_of_a_process_that_was_killed_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left, others = tmp_path / "swift-core-toy-weights-4194399-x", tmp_path / f"swift-core-toy-weights-{os.getpid()}-y"
    left.mkdir()
    others.mkdir()
    folders = Folders("toy")
    assert folders.root.parent == tmp_path
    assert (left.exists(), others.exists()) == (False, True)
    folders.close()
