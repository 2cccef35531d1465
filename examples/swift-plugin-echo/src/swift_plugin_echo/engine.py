"""An engine without a model: it echoes the last message. A token is a byte of UTF-8; all 256 are equally likely."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from swift_core.errors import CapabilityError
from swift_core.types import Completion, Request

from swift_plugin_echo.config import EchoConfig

LOGPROB = -math.log(256)


class EchoEngine:
    """Satisfies `swift_core.types.Engine` by having its methods; there is no base class."""

    capabilities = frozenset({"stream"})

    def __init__(self, config: EchoConfig) -> None:
        self.config = config

    def generate(self, requests: Sequence[Request], stream: bool = False) -> Iterator[Completion]:
        for index, request in enumerate(requests):
            said = _said(request)
            wanted = (said.upper() if self.config.upper else said).encode()
            ids = list(wanted[: request.max_tokens])
            text = bytes(ids).decode(errors="ignore")  # a letter that max_tokens cuts in two is left out
            for letter in text if stream else ():
                time.sleep(self.config.delay)
                yield Completion(index, letter)
            finish = "stop" if len(ids) == len(wanted) else "length"
            yield Completion(index, text, ids, [LOGPROB] * len(ids), finish, len(said.encode()))

    def logprobs(self, sequences: Sequence[Sequence[int]], adapter: str | None = None) -> list[list[float]]:
        return [[LOGPROB] * (len(ids) - 1) for ids in sequences]

    def embed(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        raise CapabilityError("engine echo does not embed")

    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        raise CapabilityError("engine echo does not score")

    def load_adapter(self, name: str, folder: Path) -> None:
        raise CapabilityError("engine echo takes no adapters")

    def unload_adapter(self, name: str) -> None:
        raise CapabilityError("engine echo takes no adapters")

    def sync_weights(self, weights: Iterator[tuple[str, Any]], version: int) -> None:
        raise CapabilityError("engine echo has no weights")

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


def _said(request: Request) -> str:
    """The text to echo: the last message's, or that of the token ids."""
    if request.token_ids is not None:
        return bytes(request.token_ids).decode(errors="replace")
    content = (request.messages or [{}])[-1].get("content")
    return content if isinstance(content, str) else ""
