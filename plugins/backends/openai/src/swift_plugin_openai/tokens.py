"""Base of engines in a process of their own: prompts as token ids of our template go in, token ids come out.

The process speaks vLLM's `/v1/completions`. No other template and no other detokenizer comes between training and serving.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from swift_core.errors import CapabilityError, RequestError, RunError
from swift_core.types import Completion, ModelFolder, Request, Sample

from swift_plugin_openai.adapters import read_adapter
from swift_plugin_openai.client import Client, Refused, Unreachable
from swift_plugin_openai.gate import Gate
from swift_plugin_openai.loop import Loop
from swift_plugin_openai.pieces import Pieces
from swift_plugin_openai.process import Server
from swift_plugin_openai.process_config import ProcessConfig
from swift_plugin_openai.weights import Folders, Made, write
from swift_plugin_openai.wire import STRUCTURED, Answer, Scored, echoed

BASE = "base"  # the model's name at the server; an adapter's has a number, so that its next version is another


class Died(RunError):
    """The process ended while it answered. `brief` is the message without what its log says, which is not for everybody."""

    def __init__(self, brief: str, log: str) -> None:
        super().__init__(f"{brief}. {log}")
        self.brief = brief


class TokenEngine:
    """A subclass says how its server is started (`command`, `variables`), and what its requests hold beyond `body`."""

    name = ""
    capabilities: frozenset[str] = frozenset({"stream", "concurrent"})
    serial_scores = False  # whether `logprobs` asks for one sequence at a time
    own_stops = False  # whether stop strings are found here, and the process is told to end

    def __init__(self, folder: ModelFolder, config: ProcessConfig) -> None:
        self.folder, self.template, self.config = folder, folder.template, config
        self.adapters: dict[str, Path] = {}
        self.own = folder.adapter  # the adapter that is on where a request names none
        self.current = Path(folder.folder)  # the checkpoint in service
        self.version = 0  # of its weights
        self.folders = Folders(self.name)
        self.gate = Gate()
        self._numbers = itertools.count(1)
        self._names: dict[str | None, str] = {}  # of each adapter, its name at the server
        self._users: Counter[str] = Counter()  # calls under way by such a name
        self._left = threading.Condition()
        self._starting, self._syncing = threading.RLock(), threading.Lock()
        if self.own is not None:
            self._check_adapter(self.own)
            self._names[None] = self._new_name(None)
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

    async def post_weights(self, folder: Path) -> None:
        """Have the running server load the weights of a checkpoint's folder, and forget what it computed with others. No
        request is under way. Of engines with the capability `sync`."""
        raise NotImplementedError

    # --- generation ---------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request], stream: bool = False) -> Iterator[Completion]:
        bodies = [self._prepared(request) for request in requests]
        with self._using([request.adapter for request in requests]) as names:
            self.ready()
            answers = [self._answer(n, request, {**bodies[n], "model": names[n]}, stream) for n, request in enumerate(requests)]
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
        return self.body(request, ids)

    def _drawn(self, request: Request) -> int:
        """How many answers the server makes: without sampling all are the same one."""
        return request.n if request.temperature > 0 else 1

    async def _answer(self, index: int, request: Request, sent: dict[str, Any], stream: bool) -> AsyncIterator[Completion]:
        """One request's completions; with `stream`, pieces first."""
        count = self._drawn(request)
        answers = [Answer(index, choice) for choice in range(count)]
        texts = [Pieces(self.template, request.stop) for _ in range(count)]
        usage: Mapping[str, Any] | None = None
        version = self.version
        watch = self.own_stops and bool(request.stop)
        try:
            async with aclosing(self._versioned(sent, stream or watch)) as events:
                async for version, event in events:
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
                            top = _first(piece.top_logprobs, request.top_logprobs)
                            yield replace(piece, text=text, top_logprobs=top, weight_version=version)
                    if watch and all(answer.finish for answer in answers):
                        break  # leaving hangs up, and the process ends the rest
        except (RunError, Refused) as err:
            raise await self._explained(err) from err
        for number, answer in enumerate(answers):
            if answer.finish not in ("stop", "length"):
                raise RunError(f"engine {self.name} gave up an answer ({answer.finish})")
            done = replace(
                answer.whole(usage), text=texts[number].whole(), message=None, prompt_tokens=len(sent["prompt"]),
                top_logprobs=_first(answer.top, request.top_logprobs), weight_version=version,
            )  # fmt: skip
            for choice in range(number, request.n, count):
                yield replace(done, choice=choice)

    async def _versioned(self, sent: dict[str, Any], stream: bool) -> AsyncGenerator[tuple[int, Mapping[str, Any]], None]:
        """Events, each with the version of the weights that all of them are of. A server that had just died is started again
        for a request that cannot have reached it."""
        for last in (False, True):
            try:
                async with self.gate.passing(), aclosing(self._events(self._served(sent), stream)) as events:
                    version = self.version
                    async for event in events:
                        yield version, event
                return
            except Unreachable as err:
                if last or err.sent or await asyncio.to_thread(self.server.ended, 5.0) is None:
                    raise
            await asyncio.to_thread(self.ready)

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
        return Died(
            f"engine {self.name}'s process {how} while it answered; the next request starts it again",
            f"The end of its log, {self.server.log}: {self.server.tail()}",
        )

    def _served(self, sent: dict[str, Any]) -> dict[str, Any]:
        """With the name of the folder's own adapter in the place of the base's: behind the gate, where it does not change."""
        return {**sent, "model": self._names[None]} if sent["model"] == BASE and self.own else sent

    def ready(self) -> None:
        """Have the server running, with all adapters."""
        with self._starting:
            if self.server.ensure():
                self.client.address = self.server.address
                for adapter, name in self._names.items():
                    folder = self.own if adapter is None else self.adapters[adapter]
                    assert folder is not None
                    self.loop.run(self.post_adapter(name, folder))

    # --- log-probabilities --------------------------------------------------------------------------------------------

    def logprobs(
        self, sequences: Sequence[Sequence[int]], adapter: str | None = None, *, samples: Sequence[Sample] = ()
    ) -> list[list[float]]:
        return [[logprob for logprob, _ in row] for row in self._scored(sequences, adapter, 0)]

    def likeliest(
        self, sequences: Sequence[Sequence[int]], count: int, adapter: str | None = None
    ) -> list[list[list[tuple[int, float]]]]:
        """For each sequence of n ids, at the n - 1 places after its first id, the `count` likeliest ids and their
        log-probabilities, the likeliest first."""
        return [[top[:count] for _, top in row] for row in self._scored(sequences, adapter, count)]

    def _scored(self, sequences: Sequence[Sequence[int]], adapter: str | None, top: int) -> list[list[Scored]]:
        turn = asyncio.Semaphore(1 if self.serial_scores else len(sequences) or 1)

        async def score(n: int, ids: list[int], model: str) -> AsyncIterator[tuple[int, list[Scored]]]:
            try:
                async with turn, self.gate.passing():
                    name = self._served({"model": model})["model"]
                    yield n, (await self.scores(name, ids, top) if len(ids) > 1 else [])
            except (RunError, Refused) as err:
                raise await self._explained(err) from err

        with self._using([adapter]) as (name,):
            self.ready()
            found = dict(self.loop.merged([score(n, list(ids), name) for n, ids in enumerate(sequences)]))
        return [found[n] for n in range(len(sequences))]

    async def scores(self, model: str, ids: list[int], top: int) -> list[Scored]:
        """Of one sequence's ids but the first, the log-probability, and the `top` likeliest in its place."""
        sent = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": top}
        answer = await self.client.post("/v1/completions", {**sent, "add_special_tokens": False})
        return echoed(answer["choices"][0], ids)

    # --- adapters -----------------------------------------------------------------------------------------------------

    def _check_adapter(self, folder: Path) -> dict[str, Any]:
        if "adapters" not in self.capabilities:
            raise CapabilityError(f"engine {self.name} has no adapters; merge it first: swift-core export")
        return read_adapter(folder, self.name)

    def _new_name(self, adapter: str | None) -> str:
        return f"own-{next(self._numbers)}" if adapter is None else f"adapter-{next(self._numbers)}-{adapter}"

    def load_adapter(self, name: str, folder: Path) -> None:
        """A name that is loaded is replaced, once the new one is there; its requests under way are finished first."""
        self._check_adapter(folder)
        with self._starting:
            served = self._new_name(name)
            if self.server.running:
                try:
                    self.loop.run(self.post_adapter(served, folder))
                except Refused as err:
                    raise RequestError(f"adapter {folder} cannot be loaded: {err}") from err
            with self._left:
                old, self._names[name], self.adapters[name] = self._names.get(name), served, folder
        if old is not None:
            self._drop(old)

    def unload_adapter(self, name: str) -> None:
        with self._left:
            self._known(name)
            del self.adapters[name]  # new requests are refused from here on
            old = self._names.pop(name)
        self._drop(old)

    def _drop(self, served: str) -> None:
        """Have the server forget an adapter when the calls that use it are through."""
        with self._left:
            self._left.wait_for(lambda: not self._users[served])
        with self._starting:
            if self.server.running:
                self.loop.run(self.drop_adapter(served))

    def _known(self, name: str) -> str:
        if name not in self.adapters:
            raise RequestError(f"adapter {name!r} is not loaded; loaded: {', '.join(sorted(self.adapters)) or 'none'}")
        return self._names[name]

    @contextmanager
    def _using(self, adapters: Sequence[str | None]) -> Iterator[list[str]]:
        """The names at the server of the adapters, which stay loaded meanwhile."""
        with self._left:
            names = [BASE if adapter is None else self._known(adapter) for adapter in adapters]
            self._users.update(names)
        try:
            yield names
        finally:
            with self._left:
                self._users.subtract(names)
                self._left.notify_all()

    # --- weights ------------------------------------------------------------------------------------------------------

    def sync_weights(self, weights: Iterator[tuple[str, Any]], version: int) -> None:
        """Replace weights by name: of the checkpoint, or of the adapter that the engine was opened with (peft's names).

        All is read and written into a folder first, while requests are answered. Then what is under way is finished, and the
        server loads it. Whatever fails, and wherever it is killed, the version before stays in service; the error names it.
        """
        if "sync" not in self.capabilities:
            raise CapabilityError(f"engine {self.name} cannot take weights while it runs; engines transformers and vllm can")
        with self._syncing:
            try:
                made = write(weights, self.current, self.own, self.folders)
            except Exception as err:
                raise self._kept(version, err) from err
            with self._starting:  # a server that dies meanwhile is not started between the two versions
                try:
                    old = self.loop.run(self._swap(made, version))
                except BaseException as err:
                    self.folders.drop(made.model)
                    self.folders.drop(made.adapter)
                    raise (self._kept(version, err) if isinstance(err, Exception) else err) from err
            self.folders.drop(old.model)
            self.folders.drop(old.adapter)

    def _kept(self, version: int, err: Exception) -> RunError | RequestError:
        kind = RequestError if isinstance(err, RequestError) else RunError
        told = " ".join(str(err).split()) or type(err).__name__
        return kind(f"engine {self.name}: weights of version {version} were not taken, {self.version} stays in service: {told}")

    async def _swap(self, made: Made, version: int) -> Made:
        """From the folders in service to new ones; those that no longer are."""
        async with self.gate.alone():
            model, own = made.model or self.current, made.adapter or self.own
            name = self._new_name(None) if made.adapter else self._names.get(None)
            if self.server.running:
                try:
                    if made.model:
                        await self.post_weights(model)
                    if made.adapter and name and own:
                        await self.post_adapter(name, own)
                except Exception:
                    if made.model and self.server.running:
                        try:
                            await self.post_weights(self.current)
                        except Exception:
                            await asyncio.to_thread(self.server.stop)  # it starts again with the weights in service
                    raise
            old = Made(self.current if made.model else None, self.own if made.adapter else None)
            last, self.current, self.own, self.version = self._names.get(None), model, own, version
            if name is not None:
                self._names[None] = name
            if made.adapter and last and self.server.running:
                with suppress(RunError, RequestError):  # it takes room, no more
                    await self.drop_adapter(last)
            return old

    # --- the rest -----------------------------------------------------------------------------------------------------

    def embed(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        raise CapabilityError(f"engine {self.name} does not embed; engine transformers does")

    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        raise CapabilityError(f"engine {self.name} does not score; engine transformers does")

    def sleep(self) -> None:
        raise CapabilityError(f"engine {self.name} does not sleep")

    def wake(self) -> None:
        raise CapabilityError(f"engine {self.name} does not sleep")

    def close(self) -> None:
        self.loop.close()
        self.server.close()
        self.folders.close()


def _first(likeliest: list[list[tuple[int, float]]], count: int) -> list[list[tuple[int, float]]]:
    """The `count` likeliest at each place: a server adds the chosen one."""
    return [top[:count] for top in likeliest] if count else []
