"""Base of engines in a process of their own: prompts as token ids of our template go in, token ids come out.

The process speaks vLLM's `/v1/completions`. No other template and no other detokenizer comes between training and serving.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from swift_core.errors import CapabilityError, RequestError, RunError
from swift_core.types import Completion, ModelFolder, Request, Sample

from swift_plugin_openai.adapters import read_adapter
from swift_plugin_openai.client import Client, Refused
from swift_plugin_openai.loop import Loop
from swift_plugin_openai.pieces import Pieces
from swift_plugin_openai.process import Server
from swift_plugin_openai.process_config import ProcessConfig
from swift_plugin_openai.wire import STRUCTURED, Answer, echoed

OWN = "own"  # the name at the server of the adapter that the folder came with
BASE = "base"


class TokenEngine:
    """A subclass says how its server is started (`command`, `variables`), and what its requests hold beyond `body`."""

    name = ""
    capabilities: frozenset[str] = frozenset({"stream", "concurrent"})
    serial_scores = False  # whether `logprobs` asks for one sequence at a time
    own_stops = False  # whether stop strings are found here, and the process is told to end

    def __init__(self, folder: ModelFolder, config: ProcessConfig) -> None:
        self.folder, self.template, self.config = folder, folder.template, config
        self.adapters: dict[str, Path] = {}
        self._users: Counter[str | None] = Counter()  # requests under way by adapter
        self._left = threading.Condition()
        if folder.adapter is not None:
            self._check_adapter(folder.adapter)
        self.server = Server(self.name, self.command, self.variables, config.start_timeout)
        self.loop = Loop(self.name)
        self.client = Client(
            "http://127.0.0.1", key=self.server.key, who=f"engine {self.name}", concurrent=config.concurrent,
            timeout=config.timeout, retries=0,
        )  # fmt: skip

    # --- of a subclass ------------------------------------------------------------------------------------------------

    def command(self, port: int) -> list[str]:
        """The server's words; the first is the interpreter."""
        raise NotImplementedError

    def variables(self, key: str) -> dict[str, str]:
        """Environment variables of the server, the key that requests carry among them."""
        return {}

    def check(self, request: Request) -> None:
        """Raise CapabilityError for an option that the server lacks."""

    def body(self, request: Request, ids: list[int]) -> dict[str, Any]:
        """The JSON of a request, but for its model and `stream`. vLLM's form."""
        stops = [*(() if request.ignore_eos else self.template.stop_ids()), *request.stop_ids]
        sent: dict[str, Any] = {
            "prompt": ids, "max_tokens": request.max_tokens, "min_tokens": request.min_tokens,
            "temperature": request.temperature, "top_p": request.top_p, "top_k": request.top_k, "min_p": request.min_p,
            "repetition_penalty": request.repetition_penalty, "presence_penalty": request.presence_penalty,
            "frequency_penalty": request.frequency_penalty, "stop": [] if self.own_stops else request.stop,
            "stop_token_ids": stops, "ignore_eos": request.ignore_eos, "logprobs": request.top_logprobs,
            "n": self._drawn(request), "return_token_ids": True, "return_tokens_as_token_ids": True,
            "add_special_tokens": False,
        }  # fmt: skip
        if request.seed is not None:
            sent["seed"] = request.seed
        if request.logit_bias:
            sent["logit_bias"] = {str(token): bias for token, bias in request.logit_bias.items()}
        if request.constraint:
            value = True if request.constraint.kind == "json_object" else request.constraint.value
            sent["structured_outputs"] = {STRUCTURED[request.constraint.kind]: value}
        return sent

    async def post_adapter(self, name: str, folder: Path) -> None:
        """Have the running server load an adapter."""
        await self.client.tell("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder.absolute())})

    async def drop_adapter(self, name: str) -> None:
        await self.client.tell("/v1/unload_lora_adapter", {"lora_name": name})

    # --- generation ---------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request], stream: bool = False) -> Iterator[Completion]:
        bodies = [self._prepared(request) for request in requests]
        with self._using([request.adapter for request in requests]):
            self.ready()
            answers = [self._answer(n, request, bodies[n], stream) for n, request in enumerate(requests)]
            yield from self.loop.merged(answers)

    def _prepared(self, request: Request) -> dict[str, Any]:
        if any(request.media.values()):
            raise CapabilityError(f"engine {self.name} takes text only here, and the request has media")
        if request.constraint and "constraint" not in self.capabilities:
            raise CapabilityError(f"engine {self.name} has no constraints ({request.constraint.kind})")
        self.check(request)
        if request.token_ids is not None:
            ids = list(request.token_ids)
        else:
            ids = self.template.prompt(request.messages or [], request.tools, **request.template_kwargs)
        if not ids:
            raise RequestError("the request has neither messages nor token ids")
        return {"model": self._served(request.adapter), **self.body(request, ids)}

    def _served(self, adapter: str | None) -> str:
        """What the server calls a request's model."""
        if adapter is None:
            return OWN if self.folder.adapter else BASE
        if adapter not in self.adapters:
            raise RequestError(f"adapter {adapter!r} is not loaded; loaded: {', '.join(sorted(self.adapters)) or 'none'}")
        return f"adapter-{adapter}"

    def _drawn(self, request: Request) -> int:
        """How many answers the server makes: without sampling all are the same one."""
        return request.n if request.temperature > 0 else 1

    async def _answer(self, index: int, request: Request, sent: dict[str, Any], stream: bool) -> AsyncIterator[Completion]:
        """One request's completions; with `stream`, pieces first."""
        count = self._drawn(request)
        answers = [Answer(index, choice) for choice in range(count)]
        texts = [Pieces(self.template, request.stop) for _ in range(count)]
        usage: Mapping[str, Any] | None = None
        watch = self.own_stops and bool(request.stop)
        try:
            async with aclosing(self._events(sent, stream or watch)) as events:
                async for event in events:
                    usage = event.get("usage") or usage
                    for choice in event.get("choices") or ():
                        number = choice.get("index", 0)
                        if texts[number].stopped:
                            continue
                        piece = answers[number].add(choice)
                        if not (stream or watch):
                            texts[number].ids += piece.token_ids
                            continue
                        text = texts[number].feed(piece.token_ids)
                        if texts[number].stopped:
                            answers[number].finish = "stop"
                        if stream and (piece.token_ids or text):
                            yield replace(piece, text=text, top_logprobs=_first(piece.top_logprobs, request.top_logprobs))
                    if watch and all(answer.finish for answer in answers):
                        break  # leaving hangs up, and the process ends the rest
        except (RunError, Refused) as err:
            raise await self._explained(err) from err
        for number, answer in enumerate(answers):
            if answer.finish not in ("stop", "length"):
                raise RunError(f"engine {self.name} gave up an answer ({answer.finish})")
            done = replace(
                answer.whole(usage), text=texts[number].whole(), message=None, prompt_tokens=len(sent["prompt"]),
                top_logprobs=_first(answer.top, request.top_logprobs),
            )  # fmt: skip
            for choice in range(number, request.n, count):
                yield replace(done, choice=choice)

    async def _events(self, sent: dict[str, Any], stream: bool) -> AsyncGenerator[Mapping[str, Any], None]:
        if not stream:
            yield await self.client.post("/v1/completions", {**sent, "stream": False}) or {}
            return
        body = {**sent, "stream": True, "stream_options": {"include_usage": True}}
        async with aclosing(self.client.events("/v1/completions", body)) as events:
            async for event in events:
                yield event

    async def _explained(self, err: RunError | RequestError) -> RunError | RequestError:
        """A request that was under way when the server died says so."""
        if isinstance(err, Refused):
            return err
        how = await asyncio.to_thread(self.server.ended, 5.0)
        if how is None:
            return err
        return RunError(
            f"engine {self.name}'s process {how} while it answered; the next request starts it again. "
            f"The end of its log, {self.server.log}: {self.server.tail()}"
        )

    def ready(self) -> None:
        """Have the server running, with all adapters."""
        if self.server.ensure():
            self.client.address = self.server.address
            own = {OWN: self.folder.adapter} if self.folder.adapter else {}
            for name, folder in {**own, **{f"adapter-{name}": folder for name, folder in self.adapters.items()}}.items():
                self.loop.run(self.post_adapter(name, folder))

    # --- log-probabilities --------------------------------------------------------------------------------------------

    def logprobs(
        self, sequences: Sequence[Sequence[int]], adapter: str | None = None, *, samples: Sequence[Sample] = ()
    ) -> list[list[float]]:
        model = self._served(adapter)
        turn = asyncio.Semaphore(1 if self.serial_scores else len(sequences) or 1)

        async def score(n: int, ids: list[int]) -> AsyncIterator[tuple[int, list[float]]]:
            try:
                async with turn:
                    yield n, (await self.scores(model, ids) if len(ids) > 1 else [])
            except (RunError, Refused) as err:
                raise await self._explained(err) from err

        with self._using([adapter]):
            self.ready()
            found = dict(self.loop.merged([score(n, list(ids)) for n, ids in enumerate(sequences)]))
        return [found[n] for n in range(len(sequences))]

    async def scores(self, model: str, ids: list[int]) -> list[float]:
        """The log-probabilities of one sequence's ids but the first."""
        sent = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        answer = await self.client.post("/v1/completions", {**sent, "add_special_tokens": False})
        return echoed(answer["choices"][0], len(ids))

    # --- adapters -----------------------------------------------------------------------------------------------------

    def _check_adapter(self, folder: Path) -> dict[str, Any]:
        if "adapters" not in self.capabilities:
            raise CapabilityError(f"engine {self.name} has no adapters; merge it first: swift-core export")
        return read_adapter(folder, self.name)

    def load_adapter(self, name: str, folder: Path) -> None:
        self._check_adapter(folder)
        if name in self.adapters:
            self.unload_adapter(name)
        if self.server.running:
            try:
                self.loop.run(self.post_adapter(f"adapter-{name}", folder))
            except Refused as err:
                raise RequestError(f"adapter {folder} cannot be loaded: {err}") from err
        self.adapters[name] = folder

    def unload_adapter(self, name: str) -> None:
        if name not in self.adapters:
            raise RequestError(f"adapter {name!r} is not loaded; loaded: {', '.join(sorted(self.adapters)) or 'none'}")
        del self.adapters[name]  # new requests are refused from here on
        with self._left:
            self._left.wait_for(lambda: not self._users[name])
        if self.server.running:
            self.loop.run(self.drop_adapter(f"adapter-{name}"))

    @contextmanager
    def _using(self, names: Sequence[str | None]) -> Iterator[None]:
        with self._left:
            self._users.update(names)
        try:
            yield
        finally:
            with self._left:
                self._users.subtract(names)
                self._left.notify_all()

    # --- the rest -----------------------------------------------------------------------------------------------------

    def embed(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        raise CapabilityError(f"engine {self.name} does not embed; engine transformers does")

    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        raise CapabilityError(f"engine {self.name} does not score; engine transformers does")

    def sync_weights(self, weights: Iterator[tuple[str, Any]], version: int) -> None:
        raise CapabilityError(f"engine {self.name} cannot take weights while it runs; engine transformers can")

    def sleep(self) -> None:
        raise CapabilityError(f"engine {self.name} does not sleep")

    def wake(self) -> None:
        raise CapabilityError(f"engine {self.name} does not sleep")

    def close(self) -> None:
        self.loop.close()
        self.server.close()


def _first(likeliest: list[list[tuple[int, float]]], count: int) -> list[list[tuple[int, float]]]:
    """The `count` likeliest at each place: a server adds the chosen one."""
    return [top[:count] for top in likeliest] if count else []
