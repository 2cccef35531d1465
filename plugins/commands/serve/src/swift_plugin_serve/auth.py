"""API keys: where they come from, and whether a request has one."""

from __future__ import annotations

import hmac
import os
from collections.abc import Sequence
from pathlib import Path

from swift_core.errors import RequestError

VARIABLE = "SWIFT_API_KEY"


def keys_of(given: Sequence[str], file: str | None) -> tuple[str, ...]:
    """Keys of the command line, the environment and a file with one a line. Raises RequestError."""
    found = [*given, *([os.environ[VARIABLE]] if os.environ.get(VARIABLE) else [])]
    if file is not None:
        try:
            lines = [line.strip() for line in Path(file).expanduser().read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as err:
            raise RequestError(f"--api-key-file {file}: {getattr(err, 'strerror', None) or 'not a text file'}") from None
        lines = [line for line in lines if line and not line.startswith("#")]
        if not lines:
            raise RequestError(f"--api-key-file {file}: it holds no key; one a line is expected")
        found += lines
    if any(not key.strip() for key in found):
        raise RequestError("--api-key: the key is empty")
    return tuple(dict.fromkeys(found))


def authorized(header: str | None, keys: Sequence[str]) -> bool:
    """Whether a header's bearer token is one of the keys; all are compared, in constant time. Without keys anyone may ask."""
    if not keys:
        return True
    scheme, _, token = (header or "").partition(" ")
    given = token.strip().encode("utf-8", "replace")
    matches = [hmac.compare_digest(given, key.encode("utf-8", "replace")) for key in keys]
    return scheme.lower() == "bearer" and any(matches)
