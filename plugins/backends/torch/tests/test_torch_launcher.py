"""The launcher: one process runs inline, several through torchrun; and the gradients of two ranks are those of one."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from swift_core.errors import Interrupted, RequestError, RunError
from swift_core.types import Job
from swift_plugin_torch.backend import TorchBackend
from swift_plugin_torch.config import TorchConfig
from swift_plugin_torch.launcher import TorchLauncher, first_error

# Six microbatches of a linear model's inputs, of different weights. Rank 0 takes the first five, then none.
STEPS = """
from types import SimpleNamespace
import torch
from swift_core.types import Batch

CONFIG = SimpleNamespace(learning_rate=0.1, weight_decay=0.0, betas=[0.9, 0.999])


class Linear(torch.nn.Linear):
    def forward(self, x, use_cache):
        return SimpleNamespace(logits=super().forward(x))


def policy():
    torch.manual_seed(0)
    model = Linear(4, 3)
    return SimpleNamespace(
        model=model, trainable=lambda: dict(model.named_parameters()), make_optimizer=lambda groups: None,
        param_groups=lambda config: [{"params": list(model.parameters())}],
    )


def batches():
    generator = torch.Generator().manual_seed(1)
    for n in range(6):
        weights = torch.full((2, 1), n + 1.0)
        x = torch.randn(2, 4, generator=generator)
        yield Batch({"x": x}, torch.zeros(2, 1), weights, [n], float(weights.sum()), 7 * n, n)


def loss_fn(outputs, batch):
    return (outputs.logits ** 2 * batch.weights).sum()


def work(steps, shares):
    results = []
    for share in shares:
        result = steps.forward_backward(share, loss_fn)
        norm = steps.optimizer_step(0.1, 1.0)
        results.append([result.loss, result.weight, result.tokens, result.trained_tokens, norm])
    evaluated = steps.evaluate(shares[0], loss_fn)
    return [*results, [evaluated.loss, evaluated.weight, evaluated.tokens, evaluated.trained_tokens, 0.0]]
"""

SCRIPT = """
import json, os, sys
from pathlib import Path
from safetensors.torch import save_file
from swift_plugin_torch.backend import TorchBackend
from swift_plugin_torch.config import TorchConfig
from two_ranks import *

folder = Path(sys.argv[1])
backend = TorchBackend(TorchConfig(device="cpu", processes=2))
model = policy()
steps = backend.prepare({"policy": model}, None, CONFIG)
found = list(batches())
mine = [found[:5], []] if backend.rank == 0 else [found[5:], found[:2]]
results = work(steps, mine)
votes = [backend.all_true(True), backend.all_true(backend.rank == 0)]
(folder / f"rank-{backend.rank}.json").write_text(json.dumps({
    "results": results, "votes": votes, "world": backend.world, "threads": backend.describe()["threads"],
}))
save_file(dict(model.model.state_dict()), folder / f"weights-{backend.rank}.safetensors")
steps.save(folder)
backend.close()
os._exit(0)  # the interpreter's own end is not what is tested
"""


def test_two_ranks_step_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "two_ranks.py").write_text(STEPS)
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    launcher = TorchLauncher(TorchConfig(processes=2, threads=1))
    assert launcher.processes == 2
    launcher.launch(Job(tmp_path, [sys.executable, str(tmp_path / "script.py"), str(tmp_path)], lambda: pytest.fail("inline")))

    here: dict[str, Any] = {}
    exec(STEPS, here)
    backend = TorchBackend(TorchConfig(device="cpu"))
    model = here["policy"]()
    found = list(here["batches"]())
    expected = here["work"](backend.prepare({"policy": model}, None, here["CONFIG"]), [found, found[:2]])
    for rank in (0, 1):
        told = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        for mine, theirs in zip(told["results"], expected, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5)
        assert (told["votes"], told["world"], told["threads"]) == ([True, False], 2, 1)
        weights = load_file(tmp_path / f"weights-{rank}.safetensors")
        for name, tensor in model.model.state_dict().items():
            assert torch.allclose(weights[name], tensor, atol=1e-6), name
    names = {file.name for file in tmp_path.glob("*.safetensors")}
    assert names >= {"optimizer.safetensors", "random-0.safetensors", "random-1.safetensors"}


def test_an_error_of_the_ranks_is_raised_here_as_it_was_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The kernel's own rank, in a folder whose run it cannot read."""
    (tmp_path / "data").mkdir()
    stale = tmp_path / "data" / "error-00007.json"
    stale.write_text('{"type": "RunError", "message": "of an earlier try", "exit_code": 1, "time": 0}')
    job = Job(tmp_path, [sys.executable, "-m", "swift_core.rank", str(tmp_path)], lambda: None)
    with pytest.raises(RequestError, match=rf"^{tmp_path}/config.yaml: no such file$"):
        TorchLauncher(TorchConfig(processes=2)).launch(job)
    told = capfd.readouterr()
    assert "Traceback" not in told.err + told.out
    assert "no such file" not in told.err + told.out  # it is printed once, by the command


def test_one_process_runs_inline(tmp_path: Path) -> None:
    ran: list[int] = []
    TorchLauncher(TorchConfig()).launch(Job(tmp_path, ["no such program"], lambda: ran.append(os.getpid())))
    assert ran == [os.getpid()]

    def fail() -> None:
        raise RunError("here")

    with pytest.raises(RunError, match=r"^here$"):
        TorchLauncher(TorchConfig()).launch(Job(tmp_path, [], fail))


def test_which_error_is_told(tmp_path: Path) -> None:
    def write(rank: int, kind: str, exit_code: int) -> None:
        error = {"type": kind, "message": f"rank {rank}", "exit_code": exit_code, "time": 10.0 - rank}
        (tmp_path / "data" / f"error-{rank:05d}.json").write_text(json.dumps(error))

    (tmp_path / "data").mkdir()
    assert first_error(tmp_path, 0, interrupted=False) is None
    silent = first_error(tmp_path, 1, interrupted=False)
    assert (type(silent), str(silent)) == (RunError, "a rank ended with exit code 1; its output above says why")
    assert "killed by signal 9: there was too little memory" in str(first_error(tmp_path, 128 + 9, interrupted=False))
    write(0, "Interrupted", 1)
    assert type(first_error(tmp_path, 1, interrupted=True)) is Interrupted
    # torchrun ends the other ranks when one fails: they are not the reason.
    assert str(first_error(tmp_path, 1, interrupted=False)) == str(silent)
    write(1, "PluginLoadError", 2)
    told = first_error(tmp_path, 1, interrupted=False)
    assert (type(told), str(told)) == (RequestError, "rank 1")
    write(1, "PluginError", 1)
    assert type(first_error(tmp_path, 1, interrupted=False)) is RunError
    write(2, "RequestError", 2)  # the first in time
    assert str(first_error(tmp_path, 1, interrupted=False)) == "rank 2"
