"""Starts the ranks of a run: in this process for one, through torchrun for several. Torch-free."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from swift_core.errors import Interrupted, RequestError, RunError
from swift_core.types import Job

from swift_plugin_torch.config import TorchConfig

KILLED = 128
"""An exit code above this is that of a killed rank: 128 and the signal's number, as in a shell."""


class TorchLauncher:
    """`processes` ranks on this machine."""

    def __init__(self, config: TorchConfig) -> None:
        self.processes = config.processes
        self.threads = config.threads

    def launch(self, job: Job) -> None:
        """Run the job. A rank's error is raised here as it was there."""
        if self.processes == 1:
            job.inline()
            return
        for stale in job.folder.glob("data/error-*.json"):
            stale.unlink()
        threads = self.threads or max(1, (os.cpu_count() or 1) // self.processes)
        command = [
            sys.executable, "-m", "swift_plugin_torch.torchrun", "--standalone", f"--nproc-per-node={self.processes}",
            *job.argv[1:],
        ]  # fmt: skip
        # Ctrl-C reaches this process alone, which passes it on once: the ranks then finish their step and save.
        process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, start_new_session=True)
        asked = 0
        with _sigterm_as_ctrl_c():
            while True:
                try:
                    code = process.wait()
                    break
                except KeyboardInterrupt:
                    asked += 1
                    process.send_signal(signal.SIGTERM if asked < 3 else signal.SIGKILL)
        if asked > 1:
            raise KeyboardInterrupt
        error = first_error(job.folder, code, asked > 0)
        if error:
            raise error


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """As with one process, a SIGTERM asks for a stop with a checkpoint."""

    def ask(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, ask)
    except ValueError:  # not in the main thread: the caller handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def first_error(folder: Path, code: int, interrupted: bool) -> Exception | None:
    """The first error that a rank wrote, else one that names the exit code; None when all went well."""
    if code > KILLED:
        memory = ": there was too little memory, or somebody did it" if code - KILLED == signal.SIGKILL else ""
        return RunError(f"a rank was killed by signal {code - KILLED}{memory}")
    errors = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("data/error-*.json")]
    for error in sorted(errors, key=lambda error: error["time"]):
        if error["type"] == "Interrupted" and not interrupted:
            continue  # by torchrun, because another rank failed
        kinds = {"Interrupted": Interrupted, "RequestError": RequestError}
        kind = kinds.get(error["type"], RequestError if error["exit_code"] == 2 else RunError)
        return kind(error["message"])
    return RunError(f"a rank ended with exit code {code}; its output above says why") if code else None
