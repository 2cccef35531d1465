"""Base of engines whose library has no server of its own: ours runs in the library's environment, with their backend file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from swift_core.errors import CapabilityError
from swift_core.types import ModelFolder, Request

from swift_plugin_openai.process_config import ProcessConfig
from swift_plugin_openai.tokens import TokenEngine

SERVER = Path(__file__).with_name("worker_http.py")


class WorkerEngine(TokenEngine):
    """`backend` is the file that runs in the process; `lacks` are a request's options that it does not have."""

    backend: Path
    lacks: tuple[str, ...] = ()
    own_stops = True

    def __init__(self, folder: ModelFolder, config: ProcessConfig, python: str) -> None:
        self.python = python
        super().__init__(folder, config)

    def settings(self) -> dict[str, Any]:
        """What the backend is opened with, as JSON."""
        raise NotImplementedError

    def command(self, port: int) -> list[str]:
        return [self.python, "-I", str(SERVER), str(self.backend), str(port), json.dumps(self.settings())]

    def variables(self, key: str) -> dict[str, str]:
        threads = {"OMP_NUM_THREADS": str(self.config.threads)} if self.config.threads else {}
        return {"SWIFT_WORKER_KEY": key, **threads}

    def check(self, request: Request) -> None:
        plain = Request()
        for name in self.lacks:
            if getattr(request, name) != getattr(plain, name):
                raise CapabilityError(f"engine {self.name} has no {name}")
