"""A jsonl file that a killed call goes on with: beside it stands a mark of what it is the file of, until it is finished."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from swift_core.errors import RequestError


def mark_of(output: Path) -> Path:
    return output.with_name(output.name + ".job")


def begin(output: Path, job: dict[str, Any]) -> bytes:
    """The whole lines that the file holds of this job already; b"" for a new file, which is made. A half-written last line is
    cut off. Raises RequestError for a file that is finished, or of another job."""
    mark = mark_of(output)
    if not output.exists():
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(_fingerprint(job), encoding="utf-8")
        output.write_text("", encoding="utf-8")
        return b""
    if not mark.exists():
        raise RequestError(f"output {output} exists and is finished; choose another --output, or remove it")
    if mark.read_text(encoding="utf-8") != _fingerprint(job):
        raise RequestError(f"output {output} was begun with another model, data set or settings; remove it, or choose another")
    whole = output.read_bytes()
    lines = whole[: whole.rfind(b"\n") + 1]
    if len(lines) != len(whole):
        output.write_bytes(lines)
    return lines


def finish(output: Path) -> None:
    """The file holds all that it should."""
    mark_of(output).unlink()


def _fingerprint(job: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(job, sort_keys=True, default=str).encode()).hexdigest()
