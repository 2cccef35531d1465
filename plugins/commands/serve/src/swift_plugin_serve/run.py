"""Starts uvicorn on an application, and ends it as asked: stop taking, finish or tell, close."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from swift_core.errors import RequestError

from swift_plugin_serve.admission import ENDING
from swift_plugin_serve.errors import ApiError
from swift_plugin_serve.logs import JsonHandler
from swift_plugin_serve.memory import EVERY, trim
from swift_plugin_serve.served import Served

AFTER = 5.0  # seconds for the last events to reach their clients, once the grace is over


class Server(uvicorn.Server):
    """A server whose signals begin a graceful end: the second one ends at once."""

    def __init__(self, config: uvicorn.Config, served: Served) -> None:
        super().__init__(config)
        self.served = served
        self._timer: asyncio.TimerHandle | None = None
        self._trimming: asyncio.Future[None] | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop, numbers = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            loop.add_signal_handler(number, self.end, number)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    async def on_tick(self, counter: int) -> bool:
        """uvicorn calls this ten times a second."""
        if counter % (10 * EVERY) == 0:
            self._trimming = asyncio.ensure_future(asyncio.to_thread(trim))
        return await super().on_tick(counter)

    def end(self, number: int) -> None:
        """Take no more requests; those under way may finish within the grace."""
        if self.should_exit:
            self.served.end(ApiError(503, ENDING, code="shutting_down"))
            self.force_exit = True
            return
        self.should_exit = True
        grace, gate = self.served.settings.grace, self.served.admission
        gate.close()
        self.served.log("ending", signal=signal.Signals(number).name, running=gate.running, waiting=gate.waiting, grace=grace)
        ended = ApiError(503, f"{ENDING}, and this answer did not finish within {grace:g} seconds", code="shutting_down")
        self._timer = asyncio.get_running_loop().call_later(grace, self.served.end, ended)


def bound(host: str, port: int) -> socket.socket:
    """A listening socket. Raises RequestError where it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
    except (OSError, OverflowError) as err:
        found.close()
        raise RequestError(f"--host {host} --port {port}: {getattr(err, 'strerror', None) or err}") from None
    return found


def run(app: Any, served: Served, listening: socket.socket, certificate: str | None = None, key: str | None = None) -> None:
    """Serve until a signal."""
    for name in ("uvicorn", "uvicorn.error", "uvicorn.asgi"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [JsonHandler(served.log)], False
        logger.setLevel(logging.WARNING)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, lifespan="off", ssl_certfile=certificate, ssl_keyfile=key,
        timeout_graceful_shutdown=int(served.settings.grace + AFTER) + 1, h11_max_incomplete_event_size=64 << 10, ws="none",
        timeout_keep_alive=75,
    )  # fmt: skip
    host, port = listening.getsockname()[:2]
    scheme = "https" if certificate else "http"
    shown = f"[{host}]" if ":" in host else host
    served.log("listening", url=f"{scheme}://{shown}:{port}/v1", model=served.name, models=served.names())
    Server(config, served).run(sockets=[listening])
    served.log("ended")
