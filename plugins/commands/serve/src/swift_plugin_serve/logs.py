"""Structured logs: one JSON object a line on standard error. What was asked and answered is not in them, unless asked for."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from typing import IO, Any

from swift_core.errors import SwiftError


class Log:
    """Writes events. `prompts`: whether what clients sent may be written too."""

    def __init__(self, prompts: bool = False, stream: IO[str] | None = None) -> None:
        self.prompts, self._stream = prompts, stream

    def __call__(self, event: str, level: str = "info", **fields: Any) -> None:
        told = {key: value for key, value in fields.items() if value is not None}
        line = json.dumps({"time": round(time.time(), 3), "level": level, "event": event, **told}, default=str)
        stream = self._stream or sys.stderr
        stream.write(line + "\n")
        stream.flush()

    def fault(self, ident: str | None, err: BaseException) -> None:
        """An exception with its place. Its text may quote a prompt; only the kernel's own errors, made for people, are told."""
        cause = err.__cause__ or err
        place = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(cause.__traceback__)][-8:]
        text = str(err) if self.prompts or isinstance(err, SwiftError) else None
        self("fault", "error", id=ident, error=type(cause).__name__, text=text, trace=place)


class JsonHandler(logging.Handler):
    """Passes on what libraries log, such as uvicorn's notes."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self.log = log

    def emit(self, record: logging.LogRecord) -> None:
        place = None
        if record.exc_info and record.exc_info[1] is not None:
            place = traceback.format_tb(record.exc_info[1].__traceback__)[-4:]
        self.log("note", record.levelname.lower(), source=record.name, text=record.getMessage(), trace=place)
