"""Asks for the API key on every path but /health: vLLM asks for it below /v1 alone, and has calls elsewhere that change it.

Runs in vLLM's environment.
"""

import hmac
import os

OPEN = ("/health",)


class Guard:
    """ASGI. The key is VLLM_API_KEY."""

    def __init__(self, app):
        self.app, self.wanted = app, b"Bearer " + os.environ["VLLM_API_KEY"].encode()

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http" and scope["path"] not in OPEN:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self.wanted):
                await send({"type": "http.response.start", "status": 401, "headers": []})
                await send({"type": "http.response.body", "body": b""})
                return
        if scope["type"] == "websocket":
            return  # nothing here speaks it
        await self.app(scope, receive, send)
