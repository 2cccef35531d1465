"""What a server is told by its command line: who may ask, how much at once, for how long."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """Sizes are bytes, times are seconds."""

    name: str | None = None  # the model's name for clients; default: its id, or its folder's name
    keys: tuple[str, ...] = ()  # API keys; empty: anyone who reaches the port may ask
    cors: tuple[str, ...] = ()  # origins whose pages may ask
    hosts: tuple[str, ...] = ()  # names that the Host header may have; empty: any
    page: bool = False
    adapter_root: Path | None = None  # where adapters may be loaded from at run time; None: nowhere
    max_running: int = 64  # requests that the engine works on
    max_waiting: int = 256  # and that wait for it; beyond: 429
    max_body: int = 32 << 20
    max_choices: int = 128  # answers that one request may ask for
    timeout: float = 600.0  # of a request, from its arrival to its last byte
    grace: float = 20.0  # after a signal to end
    max_context: int | None = None  # tokens of prompt and answer together; default: what config.json says
    stored: int = 1000  # responses kept for previous_response_id
    stored_bytes: int = 64 << 20
    log_prompts: bool = False
