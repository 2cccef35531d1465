"""The engine `openai`: a server's chat and completions, streamed or whole, many at a time."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

from swift_core.errors import CapabilityError, RequestError, did_you_mean
from swift_core.types import Completion, Request, Sample

from swift_plugin_openai.client import Client, Refused
from swift_plugin_openai.config import OpenAIConfig
from swift_plugin_openai.loop import Loop
from swift_plugin_openai.wire import Answer, Dialect, Scored, body, echoed

OPENAI = "api.openai.com"
BEYOND = ("vllm", "sglang", "swift-core")  # `owned_by` of servers that take more than OpenAI's API has


class OpenAIEngine:
    """One server at `address`, which ends with `/v1`. The model is looked up on first use."""

    capabilities = frozenset({"stream", "concurrent", "constraint", "media"})

    def __init__(self, address: str, config: OpenAIConfig) -> None:
        self.config, self.address = config, address
        self._named: tuple[str, Dialect] | None = None
        self.client = Client(
            address, key=_key(address, config), concurrent=config.concurrent, timeout=config.timeout,
            retries=config.retries, max_wait=config.max_wait,
        )  # fmt: skip
        self.loop = Loop("openai")

    def generate(self, requests: Sequence[Request], stream: bool = False) -> Iterator[Completion]:
        model, dialect = self._model()
        for request in requests:
            if request.adapter is not None:
                raise CapabilityError("engine openai loads no adapters; one that the server has is a model: engine.model=NAME")
        bodies = [body(request, model, dialect, stream) for request in requests]
        answers = [self._answer(n, request, *bodies[n], stream) for n, request in enumerate(requests)]
        yield from self.loop.merged(answers)

    async def _answer(
        self, index: int, request: Request, path: str, sent: dict[str, Any], stream: bool
    ) -> AsyncIterator[Completion]:
        """One request's completions; with `stream`, pieces first."""
        answers = [Answer(index, choice) for choice in range(request.n)]
        usage = None
        try:
            if not stream:
                events = [await self.client.post(path, sent)]
                for choice in (events[0] or {}).get("choices", ()):
                    answers[choice.get("index", 0)].add(choice)
                usage = (events[0] or {}).get("usage")
            else:
                async for event in self.client.events(path, sent):
                    usage = event.get("usage") or usage
                    for choice in event.get("choices") or ():
                        piece = answers[choice.get("index", 0)].add(choice)
                        if piece.text or piece.token_ids:
                            yield piece
        except Refused as err:
            raise await self._explained(err, sent["model"]) from err
        for answer in answers:
            yield answer.whole(usage)

    async def _explained(self, err: Refused, model: str) -> RequestError:
        """An unknown model is told with those that the server has."""
        if err.status != 404 and "model" not in str(err).lower():
            return err
        known = [found["id"] for found in await self._models()]
        return err if model in known or not known else _unknown(model, known, self.client.who)

    def logprobs(
        self, sequences: Sequence[Sequence[int]], adapter: str | None = None, *, samples: Sequence[Sample] = ()
    ) -> list[list[float]]:
        _, dialect = self._model()
        asked = {"prompt_logprobs": 0} if dialect.beyond else {"echo": True, "logprobs": 1}
        return [[logprob for logprob, _ in row] for row in self._scored(sequences, adapter, asked)]

    def likeliest(
        self, sequences: Sequence[Sequence[int]], count: int, adapter: str | None = None
    ) -> list[list[list[tuple[int, float]]]]:
        """For each sequence of n ids, at the n - 1 places after its first id, the `count` likeliest ids and their
        log-probabilities, the likeliest first. Raises CapabilityError for a server that tells them as texts."""
        _, dialect = self._model()
        if not dialect.beyond:
            raise CapabilityError(
                f"{self.client.who} tells the likeliest tokens of a prompt as texts, not as ids: vLLM's prompt_logprobs is "
                "needed (of a server that has it though it does not say so: engine.dialect=vllm)"
            )
        return [[top[:count] for _, top in row] for row in self._scored(sequences, adapter, {"prompt_logprobs": count})]

    def _scored(self, sequences: Sequence[Sequence[int]], adapter: str | None, asked: dict[str, Any]) -> list[list[Scored]]:
        if adapter is not None:
            raise CapabilityError("engine openai loads no adapters; one that the server has is a model: engine.model=NAME")
        model, _ = self._model()

        async def score(n: int, ids: list[int]) -> AsyncIterator[tuple[int, list[Scored]]]:
            sent = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0.0, **asked}
            answer = await self.client.post("/completions", sent)
            yield n, echoed(answer["choices"][0], ids)

        found = dict(self.loop.merged([score(n, list(ids)) for n, ids in enumerate(sequences)]))
        return [found[n] for n in range(len(sequences))]

    def _model(self) -> tuple[str, Dialect]:
        """The model's name and what the server takes, asked of its list of models where options do not say."""
        if self._named is None:
            config = self.config
            listed = self.loop.run(self._models()) if config.model is None or config.dialect == "auto" else []
            known = [found["id"] for found in listed]
            if config.model is None and len(known) != 1:
                what = f"has {len(known)} models: {', '.join(known[:20])}" if known else "lists no models"
                raise RequestError(f"{self.client.who} {what}; choose one: engine.model=NAME")
            model = config.model or known[0]
            if known and model not in known:
                raise _unknown(model, known, self.client.who)
            beyond = config.dialect == "vllm" or any(found.get("owned_by") in BEYOND for found in listed)
            official = self.client.url.host == OPENAI
            self._named = model, Dialect(beyond, "max_completion_tokens" if official else "max_tokens", config.logprobs)
        return self._named

    async def _models(self) -> list[dict[str, Any]]:
        """What the server lists; nothing where it has no list."""
        try:
            answer = await self.client.get("/models")
        except Refused as err:
            if err.status in (404, 405, 501):
                return []
            raise
        listed = answer.get("data") if isinstance(answer, dict) else None
        return [found for found in listed or () if isinstance(found, dict) and "id" in found]

    def embed(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        raise CapabilityError("engine openai does not embed: a server's embeddings take texts, and this would be token ids")

    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        raise CapabilityError("engine openai does not score: OpenAI's API has no such answer")

    def load_adapter(self, name: str, folder: Path) -> None:
        raise CapabilityError("engine openai loads no adapters; one that the server has is a model: engine.model=NAME")

    def unload_adapter(self, name: str) -> None:
        raise CapabilityError("engine openai has no adapters")

    def sync_weights(self, weights: Iterator[tuple[str, Any]], version: int) -> None:
        raise CapabilityError("engine openai cannot change a server's weights")

    def sleep(self) -> None:
        raise CapabilityError("engine openai cannot put a server to sleep")

    def wake(self) -> None:
        raise CapabilityError("engine openai cannot wake a server")

    def close(self) -> None:
        self.loop.close()


def _key(address: str, config: OpenAIConfig) -> str | None:
    """The API key. One meant for OpenAI is sent to OpenAI alone, unless its variable is named."""
    named = config.api_key_env
    if named is None:
        return os.environ.get("OPENAI_API_KEY") if address.startswith(f"https://{OPENAI}/") else None
    if not (key := os.environ.get(named)):
        raise RequestError(f"engine.api_key_env: the environment has no variable {named}")
    return key


def _unknown(model: str, known: list[str], who: str) -> RequestError:
    return RequestError(f"{who} has no model {model!r}.{did_you_mean(model, known)} It has: {', '.join(known[:20])}")
