"""HTTP to a server that speaks OpenAI's API: JSON in and out, server-sent events, tries again, faults told in one line.

The API key stands in a header only; no message and no log holds it.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2 as httpx
from swift_core.errors import RequestError, RunError

AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)
FIRST_WAIT = 0.5  # seconds; doubled for each further try


class Unreachable(RunError):
    """The server did not answer, or its connection broke. `sent`: whether the request may have reached it."""

    sent = True


class Refused(RequestError):
    """The server refused a request: `status` is its HTTP status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Client:
    """One server. `concurrent` requests at a time; further ones wait. Used from one event loop.

    address: up to and with `/v1`. who: how messages name the server. retries: further tries. max_wait: the longest pause, in
    seconds. timeout: seconds without a byte.
    """

    def __init__(
        self, address: str, *, key: str | None = None, who: str | None = None, concurrent: int = 16, timeout: float = 600.0,
        retries: int = 5, max_wait: float = 60.0, sleep: Callable[[float], Any] = asyncio.sleep,
    ) -> None:  # fmt: skip
        self.url = httpx.URL(address)
        if self.url.userinfo:
            raise RequestError(
                "the address holds a password; name a variable that has the key instead: engine.api_key_env=NAME"
            )
        self.address = address.rstrip("/")
        self.who = who or f"the server at {self.address}"
        self.retries, self.max_wait, self._sleep = retries, max_wait, sleep
        self._places = asyncio.Semaphore(concurrent)
        limits = httpx.Limits(max_connections=concurrent + 4, max_keepalive_connections=concurrent)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._key = key
        # Nothing of the environment's: a proxy there is not meant for a server on this machine, nor is .netrc.
        local = self.url.host in ("127.0.0.1", "localhost", "::1")
        self._http = httpx.AsyncClient(
            headers=headers, timeout=httpx.Timeout(timeout, connect=min(timeout, 30.0)), limits=limits, trust_env=not local
        )
        self._timeout = timeout

    async def get(self, path: str) -> Any:
        """The JSON of a GET."""
        return await self._json("GET", path, None)

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON that answers a POST."""
        async with self._places:
            return await self._json("POST", path, body)

    async def tell(self, path: str, body: dict[str, Any]) -> None:
        """A POST whose answer is of no interest, unless it is an error."""
        async with self._places, self._answer("POST", path, body):
            pass

    async def events(self, path: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The JSON of each server-sent event that answers a POST, to `[DONE]`. Tried again until the first has come.

        Raises RunError where the stream breaks off, or tells of an error.
        """
        async with self._places, self._answer("POST", path, body) as response:
            done = False
            try:
                async for line in response.aiter_lines():
                    if not line.startswith("data:"):
                        continue
                    data = line[5:].strip()
                    if data == "[DONE]":
                        done = True
                        break
                    event = self._parsed(data)
                    if isinstance(event, dict) and event.get("error"):
                        raise RunError(f"{self.who} ended its answer with an error: {self._told(event)}")
                    yield event
            except httpx.HTTPError as err:
                raise Unreachable(f"{self.who} broke off in its answer ({_reason(err)})") from err
            if not done:
                raise Unreachable(f"{self.who} broke off in its answer: the stream ended before [DONE]")

    async def close(self) -> None:
        await self._http.aclose()

    async def _json(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        async with self._answer(method, path, body) as response:
            try:
                text = (await response.aread()).decode("utf-8", "replace")
            except httpx.HTTPError as err:
                raise Unreachable(f"{self.who} broke off in its answer ({_reason(err)})") from err
        return self._parsed(text)

    @asynccontextmanager
    async def _answer(self, method: str, path: str, body: dict[str, Any] | None) -> AsyncIterator[httpx.Response]:
        """A response whose status is good, tried again where that may help. Closing it cancels the request."""
        for tried in range(self.retries + 1):
            last = tried == self.retries
            try:
                request = self._http.build_request(method, self.address + path, json=body)
                response = await self._http.send(request, stream=True)
            except (httpx.HTTPError, OSError) as err:
                if last or isinstance(err, httpx.ReadTimeout | httpx.UnsupportedProtocol):
                    told = Unreachable(self._unreachable(err, tried + 1))
                    told.sent = not isinstance(err, httpx.ConnectError)
                    raise told from err
                await self._sleep(self._wait(tried, None))
                continue
            try:
                if response.status_code < 400:
                    yield response
                    return
                text = (await response.aread()).decode("utf-8", "replace")
                wait = self._wait(tried, response.headers.get("retry-after"))
            finally:
                await response.aclose()
            if last or response.status_code not in AGAIN or wait > self.max_wait:
                raise self._refusal(response.status_code, text, tried + 1, wait)
            await self._sleep(wait)

    def _wait(self, tried: int, retry_after: str | None) -> float:
        """Seconds before another try: what the server asks for, else doubled each time, a part of it by chance."""
        if retry_after is not None:
            try:
                return max(0.0, float(retry_after))
            except ValueError:
                try:
                    return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
                except ValueError:
                    pass
        return float(min(FIRST_WAIT * 2**tried, self.max_wait) * random.uniform(0.5, 1.0))

    def _unreachable(self, err: Exception, tries: int) -> str:
        if isinstance(err, httpx.ReadTimeout):
            return f"{self.who} said nothing for {self._timeout:g} seconds (engine.timeout)"
        after = f" after {tries} tries" if tries > 1 else ""
        return f"{self.who} cannot be reached{after} ({_reason(err)}). Is it running, and is the address right?"

    def _refusal(self, status: int, text: str, tries: int, wait: float) -> RequestError | RunError:
        told = self._told(self._loose(text)) or "without a reason"
        if status in (401, 403):
            have = "refused the API key" if self._key else "asks for an API key: engine.api_key_env=NAME names its variable"
            return Refused(f"{self.who} {have} ({status}: {told})", status)
        if status in AGAIN:
            after = f" after {tries} tries" if tries > 1 else ""
            asked = f"; it asks to wait {wait:g} seconds" if wait > self.max_wait else ""
            return RunError(f"{self.who} failed{after}{asked} ({status}: {told})")
        return Refused(f"{self.who} refused the request ({status}: {told})", status)

    def _parsed(self, text: str) -> Any:
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            raise RunError(f"{self.who} answered with something that is not JSON: {self._hidden(text[:200])!r}") from None

    def _loose(self, text: str) -> Any:
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text

    def _told(self, answer: Any) -> str:
        """The reason in an error's body, in the forms that servers give it."""
        if isinstance(answer, dict):
            answer = answer.get("error", answer)
        if isinstance(answer, dict):
            answer = next((answer[key] for key in ("message", "detail", "msg", "object") if answer.get(key)), answer)
        text = answer if isinstance(answer, str) else json.dumps(answer)
        return self._hidden(" ".join(text.split())[:500])

    def _hidden(self, text: str) -> str:
        """Without the API key, should a server repeat it."""
        return text.replace(self._key, "***") if self._key else text


def _reason(err: BaseException) -> str:
    return " ".join(str(err).split()) or type(err).__name__
