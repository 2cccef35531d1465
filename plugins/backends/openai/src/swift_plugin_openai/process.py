"""A server in a process of its own: started when it is needed, watched, started again once it died, ended with this process.

Its output goes to a log file, whose end is shown when something is wrong. Nothing of this process's Python reaches it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import httpx2 as httpx
from swift_core.errors import RunError

SUPERVISE = Path(__file__).with_name("supervise.py")
SHOWN = 8  # lines of a log
SCRUBBED = ("PYTHON", "VIRTUAL_ENV", "CONDA", "PIP_", "LD_PRELOAD", "OPENAI_API_KEY")  # beginnings of variables' names
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1", "PYTHONNOUSERSITE": "1"}


def environ(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's variables without those of its Python, and with `extra`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(SCRUBBED)}
    return {**kept, **OFFLINE, **extra}


class Server:
    """One server on a free port of 127.0.0.1. Its requests carry `key`, so that no other user of the machine is served.

    name: for messages. command: its words, given the port. variables: added to its environment, given the key.
    """

    def __init__(
        self, name: str, command: Callable[[int], list[str]], variables: Callable[[str], dict[str, str]], start_timeout: float
    ) -> None:  # fmt: skip
        self.name, self.start_timeout = name, start_timeout
        self.key = secrets.token_hex(16)
        self.starts = 0
        self._command, self._variables = command, variables
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self.folder = Path(tempfile.mkdtemp(prefix=f"swift-core-{name}-"))
        self.log = self.folder / "server.log"
        self._logged = 0  # bytes of the log that are of earlier starts
        self.address = ""

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def ensure(self) -> bool:
        """Have it running and answering; True where it was started now. Raises RunError, with the log's end, where it fails."""
        with self._lock:
            if self._closed:
                raise RunError(f"engine {self.name} is closed")
            if self.running:
                return False
            self._start()
            return True

    def pids(self) -> list[int]:
        """The server and what it started; not the process that watches over it."""
        if self._process is None:
            return []
        found, todo = [], [self._process.pid]
        while todo:
            for task in Path(f"/proc/{todo.pop()}/task").glob("*/children"):
                children = [int(pid) for pid in task.read_text().split()]
                found += children
                todo += children
        return found

    def ended(self, wait: float) -> str | None:
        """How it ended, waiting up to so many seconds for that; None where it runs."""
        process = self._process
        if process is None:
            return "has not been started"
        try:
            code = process.wait(wait)
        except subprocess.TimeoutExpired:
            return None
        return f"was ended by signal {code - 128}" if code > 128 else f"ended with exit code {code}"

    def tail(self) -> str:
        """What the log says since the last start, as one line: the last lines that name an error, else the last ones."""
        try:
            text = self.log.read_bytes()[self._logged :].decode("utf-8", "replace")
        except OSError:
            return ""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()]
        return " | ".join((errors or lines)[-SHOWN:])

    def stop(self) -> None:
        """End it; the next request starts it again."""
        with self._lock:
            self._stop()

    def close(self) -> None:
        """End it with all that it started. Its log goes too, unless it failed."""
        with self._lock:
            self._closed = True
            failed = self._process is not None and not self.running
            self._stop()
        if not failed:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self) -> None:
        if self._process is not None and (how := self.ended(0)):
            warnings.warn(f"engine {self.name}: its process {how}, and is started again. {self._shown()}", stacklevel=2)
        self._stop()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = self._command(port)
        with self.log.open("ab") as log:
            self._logged = log.tell()
            self._process = subprocess.Popen(
                [words[0], "-I", str(SUPERVISE), *words], stdin=subprocess.PIPE, stdout=log, stderr=log,
                env=environ(self._variables(self.key)), start_new_session=True, cwd=self.folder,
            )  # fmt: skip
        self.starts += 1
        self.address = f"http://127.0.0.1:{port}"
        try:
            self._wait()
        except BaseException:
            self._stop()
            raise

    def _wait(self) -> None:
        until = time.monotonic() + self.start_timeout
        with httpx.Client(trust_env=False, timeout=5.0) as client:
            while time.monotonic() < until:
                if how := self.ended(0.1):
                    raise RunError(f"engine {self.name} did not start: its process {how}. {self._shown()}")
                try:
                    if client.get(f"{self.address}/health").status_code == 200:
                        return
                except httpx.HTTPError:
                    pass
        raise RunError(
            f"engine {self.name} did not start in {self.start_timeout:g} seconds (engine.start_timeout). {self._shown()}"
        )

    def _shown(self) -> str:
        return f"The end of {self.log}: {self.tail() or 'it is empty'}"

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin:
            process.stdin.close()  # what watches over it ends the server
        try:
            process.wait(8)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
