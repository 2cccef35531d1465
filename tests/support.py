"""What the end-to-end tests share: running a command in this process, in a fresh interpreter, or in a warm fork.

A fork comes from a server process that has torch and the plugins imported, so that a test may start, limit and kill
a dozen runs without paying for the imports of each. It is a process of its own in every other way.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift_core.cli.main import run

WARM = [
    "pytest", "torch", "transformers", "peft", "safetensors.torch", "swift_core.training", "swift_core.session",
    "swift_core.cli.train", "swift_plugin_use.infer", "swift_plugin_transformers.loading", "swift_plugin_transformers.chat",
    "swift_plugin_lora.tuner", "swift_plugin_supervised.loop", "swift_plugin_torch.engine", "swift_plugin_huggingface.dataset",
    "transformers.models.llama.modeling_llama",
]  # fmt: skip
"""Modules that the server imports once. One that is missing is imported by the forks."""

THREADS = "backend.threads=1"
"""Sums of floats depend on the thread count; runs that are compared bit for bit share this."""


@dataclass(frozen=True)
class Result:
    """A finished command."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of error, without its `error: `. Fails when there is none, more than one, or a traceback."""
        lines = self.err.rstrip("\n").split("\n")
        found = [line for line in lines if line.startswith("error: ")]
        assert found == lines[-1:], f"exit code {self.code}, standard error:\n{self.err}"
        assert "Traceback" not in self.err
        assert "Traceback" not in self.out
        return found[0].removeprefix("error: ")

    def json(self) -> Any:
        return json.loads(self.out)

    def ok(self) -> Result:
        assert self.code == 0, f"exit code {self.code}, standard error:\n{self.err}"
        return self


def swift(*args: object, stdin: str | None = None) -> Result:
    """Run `swift-core ARGS` in this process."""
    out, err, before = io.StringIO(), io.StringIO(), sys.stdin
    try:
        if stdin is not None:
            sys.stdin = io.StringIO(stdin)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run([str(arg) for arg in args], debug=False)
    finally:
        sys.stdin = before
    return Result(code, out.getvalue(), err.getvalue())


def swift_process(*args: object, timeout: float = 120) -> Result:
    """Run `swift-core ARGS` in a fresh interpreter."""
    command = [sys.executable, "-m", "swift_core.cli.main", *map(str, args)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env, stdin=subprocess.DEVNULL)
    return Result(done.returncode, done.stdout, done.stderr)


@dataclass
class Fork:
    """A command running in a warm process."""

    process: Any
    log: Path

    def wait(self, timeout: float = 60) -> Result:
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running after {timeout} s:\n{self.read('err')}"
        return Result(self.process.exitcode, self.read("out"), self.read("err"))

    def read(self, stream: str) -> str:
        return self.log.with_suffix(f".{stream}").read_text(encoding="utf-8")

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        self.process.kill()
        self.process.join(30)

    def until(self, condition: Callable[[], Any], timeout: float = 30) -> bool:
        """Wait for a condition, looking very often. False when the process ended first."""
        end = time.monotonic() + timeout
        while not condition():
            if self.process.exitcode is not None:
                return False
            assert time.monotonic() < end, f"not seen in {timeout} s:\n{self.read('err')}"
            time.sleep(0.0002)
        return True


class Forks:
    """Starts forks. `log` is a folder for their output."""

    def __init__(self, log: Path) -> None:
        self.log, self.count = log, 0
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(WARM)

    def start(self, *args: object, file_limit: int | None = None) -> Fork:
        """Start `swift-core ARGS`. file_limit: bytes that one file may hold, as on a disk that is full."""
        self.count += 1
        log = self.log / str(self.count)
        for stream in ("out", "err"):
            log.with_suffix(f".{stream}").touch()
        process = self.context.Process(target=_child, args=([str(arg) for arg in args], str(log), file_limit), daemon=True)
        process.start()
        return Fork(process, log)

    def run(self, *args: object, file_limit: int | None = None) -> Result:
        return self.start(*args, file_limit=file_limit).wait()


def _child(args: list[str], log: str, file_limit: int | None) -> None:
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{stream}", os.O_WRONLY | os.O_APPEND), number)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.exit(run(args, debug=False))


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind in a run's log."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def summary(folder: Path) -> dict[str, Any]:
    whole: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return whole


def checkpoint(folder: Path, step: int | None = None) -> Path:
    """A checkpoint of a run; without a step, where the link `last` leads."""
    return folder / "checkpoints" / ("last" if step is None else f"step-{step}")


def weights(folder: Path, step: int | None = None) -> bytes:
    """The adapter file of a checkpoint."""
    return (checkpoint(folder, step) / "adapter_model.safetensors").read_bytes()


def state(folder: Path, step: int | None = None) -> tuple[bytes, bytes, bytes]:
    """Adapter, optimizer and random generators of a checkpoint: all that its continuation depends on."""
    names = ("adapter_model", "optimizer", "random-0")
    adapter, optimizer, generators = ((checkpoint(folder, step) / f"{name}.safetensors").read_bytes() for name in names)
    return adapter, optimizer, generators


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat_row(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def sums(first: int, count: int) -> list[dict[str, Any]]:
    """Rows of different lengths, each with a question and an answer of its own."""
    return [chat_row(f"What is {n} and {n * n}?", f"It is {n + n * n}" + "." * (n % 4)) for n in range(first, first + count)]
