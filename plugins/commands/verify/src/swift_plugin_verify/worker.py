"""Runs each verification in a process of its own, forked from a server that has the libraries imported.

A crash, a hang or a model that eats the memory ends one process and gives one row of the results; the run goes on.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from swift_plugin_verify.catalog import Architecture

WARM = [
    "torch", "swift_plugin_verify.vision_ops", "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama", "transformers.generation", "peft", "safetensors.torch",
    "swift_plugin_verify.checks", "swift_plugin_verify.build",
]  # fmt: skip
"""What the server imports once, in the order given."""


@dataclass
class Job:
    """One verification that runs. `folder` holds its models and its result, and is removed."""

    subject: Architecture | Path
    process: Any
    folder: Path
    started: float


def verify_all(
    subjects: Sequence[Architecture | Path], scratch: Path, jobs: int, limit: float
) -> Iterator[tuple[Architecture | Path, dict[str, Any]]]:
    """The result of each subject as it comes: an architecture, or a folder that holds a model. `limit`: seconds of each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(WARM)
    waiting, running = list(reversed(subjects)), list[Job]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_start(context, waiting.pop(), scratch))
            time.sleep(0.05)
            for job in list(running):
                late = time.monotonic() - job.started > limit
                if job.process.exitcode is None and not late:
                    continue
                running.remove(job)
                yield job.subject, _finish(job, limit)
    finally:
        for job in running:
            job.process.kill()
            shutil.rmtree(job.folder, ignore_errors=True)


def _start(context: Any, subject: Architecture | Path, scratch: Path) -> Job:
    # A random name: nothing may be told from what a folder is called.
    folder = scratch / os.urandom(6).hex()
    folder.mkdir(parents=True)
    process = context.Process(target=_work, args=(subject, str(folder)), daemon=True)
    process.start()
    return Job(subject, process, folder, time.monotonic())


def _finish(job: Job, limit: float) -> dict[str, Any]:
    """The result that the process wrote, or why there is none."""
    if job.process.exitcode is None:
        job.process.kill()
    job.process.join()
    seconds = round(time.monotonic() - job.started, 1)
    try:
        result: dict[str, Any] = json.loads((job.folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        code = job.process.exitcode
        why = f"stopped after {limit:.0f} s" if seconds > limit else f"its process ended with exit code {code}"
        begun = job.folder / "at"
        at = begun.read_text(encoding="utf-8") if begun.is_file() else "start"
        result = {"checks": {at: {"state": "fail", "note": why}}}
    shutil.rmtree(job.folder, ignore_errors=True)
    return {**result, "seconds": seconds}


def _work(subject: Architecture | Path, folder: str) -> None:
    """In the process: build, check, write the result."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(str(Path(folder) / "log"), os.O_WRONLY | os.O_CREAT), 2)
    from swift_plugin_verify.subject import verify_subject

    result = verify_subject(subject, Path(folder))
    (Path(folder) / "result.tmp").write_text(json.dumps(result), encoding="utf-8")
    (Path(folder) / "result.tmp").rename(Path(folder) / "result.json")


def list_architectures() -> list[Architecture]:
    """The catalog, read in a process of its own, so that this one stays small."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(WARM)
    with context.Pool(1) as pool:
        return pool.apply(_list)


def _list() -> list[Architecture]:
    from swift_plugin_verify.catalog import architectures

    return architectures()


def describe(subject: Architecture | Path) -> dict[str, Any]:
    """What names a subject in the results."""
    if isinstance(subject, Path):
        return {"kind": "folder", "model_type": "", "name": str(subject)}
    return asdict(subject)
