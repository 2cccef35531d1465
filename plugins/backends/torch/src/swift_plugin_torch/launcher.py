"""Starts the ranks of a run: in this process for one, through torchrun for several. Torch-free."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from swift_core.errors import Interrupted, RequestError, RunError
from swift_core.types import Job

from swift_plugin_torch.config import TorchConfig


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
        interrupted = False
        while True:
            try:
                code = process.wait()
                break
            except KeyboardInterrupt:
                process.send_signal(signal.SIGKILL if interrupted else signal.SIGTERM)
                interrupted = True
        if code or interrupted:
            raise first_error(job.folder, code)


def first_error(folder: Path, code: int) -> Exception:
    """The error that the lowest rank wrote, else one that names the exit code."""
    for file in sorted(folder.glob("data/error-*.json")):
        error = json.loads(file.read_text(encoding="utf-8"))
        kinds = {"Interrupted": Interrupted, "RequestError": RequestError}
        kind = kinds.get(error["type"], RequestError if error["exit_code"] == 2 else RunError)
        return kind(error["message"])
    return RunError(f"a rank ended with exit code {code}; its output above says why")
