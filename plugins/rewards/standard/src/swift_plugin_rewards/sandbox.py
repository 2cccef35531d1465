"""Runs a Python program in a process of its own with limits. See README.md for what it isolates and what it does not.

Limits: CPU and wall time, address space, size of files, number of processes and open files; an empty folder to work in, an
environment without the user's variables, and, where `unshare` may, no network and a process table of its own.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from swift_core.errors import RequestError

UNSHARE = ("unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")
OUTPUT = 4 << 20  # bytes of a file, standard output included
LAUNCH = """
import os, resource, sys
seconds, memory, output = map(int, sys.argv[1:4])
for name, most in (("CPU", seconds), ("AS", memory), ("FSIZE", output), ("CORE", 0), ("NOFILE", 64), ("NPROC", 64)):
    try:
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
    except (ValueError, OSError):
        pass
os.execv(sys.executable, [sys.executable, "-I", *sys.argv[4:]])
"""


@dataclass(frozen=True)
class Ran:
    """How a program ended. code: its exit status, None where its time ran out."""

    code: int | None
    output: str


@cache
def unshares() -> bool:
    """Whether this user may have a network and a process table apart."""
    if shutil.which(UNSHARE[0]) is None:
        return False
    return subprocess.run([*UNSHARE, "true"], capture_output=True, timeout=20).returncode == 0


def isolates(network: str) -> bool:
    """Whether programs run without a network. Raises RequestError where that is asked for and cannot be had."""
    if network == "allow":
        return False
    if not unshares() and network == "deny":
        raise RequestError("reward.code: network=deny needs `unshare` with user namespaces, which this machine does not allow")
    return unshares()


def run(
    files: dict[str, str], arguments: Sequence[str], stdin: str, timeout: float, memory: int, alone: bool
) -> Ran:  # fmt: skip
    """Run `python ARGUMENTS` in a folder that holds `files`. memory: MiB. alone: without a network."""
    with tempfile.TemporaryDirectory(prefix="swift-code-") as folder:
        for name, text in files.items():
            (Path(folder) / name).write_text(text, encoding="utf-8", errors="replace")
        (Path(folder) / ".stdin").write_text(stdin, encoding="utf-8", errors="replace")
        limits = [str(max(1, int(timeout + 1))), str(memory << 20), str(OUTPUT)]
        command = [*(UNSHARE if alone else ()), sys.executable, "-I", "-c", LAUNCH, *limits, *arguments]
        environment = {"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
        said = Path(folder) / ".stdout"
        with (Path(folder) / ".stdin").open("rb") as given, said.open("wb") as told:
            process = subprocess.Popen(
                command, cwd=folder, stdin=given, stdout=told, stderr=subprocess.DEVNULL, env=environment,
                start_new_session=True, close_fds=True,
            )  # fmt: skip
            code: int | None
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # what it left running in its group too
                process.wait()
        return Ran(code, said.read_text(encoding="utf-8", errors="replace"))
