"""The engine `transformers`: many requests at once in this process, with log-probabilities, constraints and adapters.

`generate` may be called from many threads; a scheduler's thread runs the model for all of them (see `scheduler`, `runner`).
"""

from __future__ import annotations

import random
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from swift_core.errors import CapabilityError, RequestError
from swift_core.types import Batch, Completion, ModelBundle, Request, Sample

from swift_plugin_torch import heads, packed, pools
from swift_plugin_torch.adapters import Adapters, begun_as
from swift_plugin_torch.checks import check, load_processors
from swift_plugin_torch.config import TransformersEngineConfig
from swift_plugin_torch.constraints import Constraints
from swift_plugin_torch.prompts import kinds, media_inputs, placed, text_ids
from swift_plugin_torch.rows import Call, Prompt, Row
from swift_plugin_torch.runner import Runner
from swift_plugin_torch.scheduler import Scheduler
from swift_plugin_torch.scoring import Scoring
from swift_plugin_torch.texts import Text


class TransformersEngine:
    """Runs a bundle's model, loaded in this process."""

    capabilities: frozenset[str] = frozenset({"stream", "concurrent", "constraint", "adapters", "sync", "sleep"})

    def __init__(self, bundle: ModelBundle, config: TransformersEngineConfig) -> None:
        if bundle.template is None:
            raise RequestError("the engine needs a bundle with its template")
        self.bundle, self.template, self.config = bundle, bundle.template, config
        self.tokenizer = getattr(bundle.processor, "tokenizer", bundle.processor)
        if getattr(self.template, "media", None) is not None:
            self.capabilities |= {"media"}
        self.capabilities |= heads.CAPABILITIES.get(bundle.task, set())
        self._adapters = Adapters(bundle.model.eval(), bundle.in_training)
        self._processors = load_processors(config.processors)
        self._scoring = Scoring(self.template, config.whole)
        self._started = threading.RLock()
        self._rendering = threading.Lock()  # tokenizers change their settings while they work
        self._runner: Runner | None = None
        self._scheduler: Scheduler | None = None
        self._constraints: Constraints | None = None
        self._stop_ids: list[int] | None = None
        self._awake_on: torch.device | None = None
        self._closed = False
        self._version = 0
        pools.release()  # of the thread that has loaded the model, and may never compute again

    @property
    def model(self) -> Any:
        return self._adapters.model

    @property
    def adapters(self) -> set[str]:
        return self._adapters.names

    @property
    def version(self) -> int:
        return self._version

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    # --- generation ---------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request], stream: bool = False) -> Iterator[Completion]:
        """Completions as they are finished; closing the iterator cancels the rest.

        Log-probabilities, `top_logprobs` too, are of the model's own distribution: log softmax of its logits, before bias,
        penalties, constraint, temperature and the rest, as OpenAI's and vLLM's are. A seed gives the same answer whatever else
        runs, up to rounding. An error of one request ends its call alone.
        """
        call = Call(stream)
        rows = self._rows(call, requests)
        try:
            if rows:
                self._start()[1].submit(rows)
                pools.release()  # the scheduler's thread computes from here on
            left = len(rows)
            while left:
                found = call.results.get()
                if isinstance(found, BaseException):
                    raise found
                left -= found.finish is not None
                yield found
        finally:
            call.cancelled = True

    def _rows(self, call: Call, requests: Sequence[Request]) -> list[Row]:
        """A row for each completion asked for. Raises RequestError or ValueError where one cannot be made."""
        if not requests:
            return []
        self._ready()
        runner = self._start()[0]
        rows: list[Row] = []
        for index, request in enumerate(requests):
            self._adapters.check(request.adapter)
            rows += self._rows_of(call, index, request, runner)
        if runner.slots is None:  # those of one length are generated together
            rows.sort(key=lambda row: len(row.prompt.ids))
        return rows

    def _rows_of(self, call: Call, index: int, request: Request, runner: Runner) -> list[Row]:
        config = self.model.config.get_text_config(decoder=True)
        check(request, getattr(config, "vocab_size", 1 << 31))
        with self._rendering:
            ids = text_ids(self.template, request)
            stops = frozenset(request.stop_ids) | (frozenset() if request.ignore_eos else frozenset(self._stops()))
            inputs = None
            if kinds(request) or runner.slots is None or not self._adapters.joinable(request.adapter):
                inputs = media_inputs(self.template, request)
        if inputs is not None:
            ids = inputs["input_ids" if "input_ids" in inputs else "decoder_input_ids"][0].tolist()
        if not ids:
            raise RequestError("the prompt is empty: there is no token to continue")
        request = self._fitted(request, len(ids), config)
        matcher = None
        if request.constraint is not None:
            if self._constraints is None:
                self._constraints = Constraints(self.tokenizer, self._stops())
            matcher = self._constraints.matcher(request.constraint)
        prompt = Prompt(ids, inputs, len(ids), request.n - 1)
        made = []
        for choice in range(request.n):
            seed: Any = int(torch.randint(2**62, ())) if request.seed is None else f"{request.seed}/{choice}"
            made.append(
                Row(
                    call, index, choice, request, prompt, request.adapter, stops, Text(self.template.decode, request.stop),
                    random.Random(seed), matcher.copy() if matcher and choice else matcher,
                )
            )  # fmt: skip
        return made

    def _fitted(self, request: Request, count: int, config: Any) -> Request:
        """The request with no more tokens than the model has positions for."""
        limit = getattr(config, "max_position_embeddings", None)
        if not isinstance(limit, int) or limit <= 0 or self.model.config.is_encoder_decoder:
            return request
        if count >= limit:
            raise RequestError(f"the prompt has {count} tokens, and the model takes {limit} with the answer")
        if count + request.max_tokens <= limit:
            return request
        fields = {name: getattr(request, name) for name in request.__dataclass_fields__}
        return Request(**{**fields, "max_tokens": limit - count})

    def _stops(self) -> list[int]:
        if self._stop_ids is None:
            self._stop_ids = list(self.template.stop_ids())
        return self._stop_ids

    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else (self._stops() or [0])[0])

    def _start(self) -> tuple[Runner, Scheduler]:
        """What runs requests, made with the first of them."""
        with self._started:
            if self._runner is None or self._scheduler is None:
                self._pack()
                self._runner = Runner(
                    self._adapters, self.template, self._pad(), self.config, self._processors, self.tokenizer
                )  # fmt: skip
                self._runner.version = self._version
                self._scheduler = Scheduler(self._runner, self.config.batch_size, self.config.whole)
                weakref.finalize(self, self._scheduler.close)  # a thread within torch as Python ends would abort the process
            return self._runner, self._scheduler

    def _pack(self) -> None:
        if self.config.packed and not self.bundle.in_training:
            packed.pack(self.model)

    @contextmanager
    def _weights(self) -> Iterator[None]:
        """The model's weights in their plain layout, to be changed; the caller has the model for itself."""
        packed.unpack(self.model)
        try:
            yield
        finally:
            if self._runner is not None:
                self._pack()

    def _ready(self) -> None:
        if self._closed:
            raise RequestError("the engine is closed")
        if self._awake_on is not None:
            raise RequestError("the engine sleeps: wake it first")

    # --- forward passes -----------------------------------------------------------------------------------------------

    def logprobs(
        self, sequences: Sequence[Sequence[int]], adapter: str | None = None, *, samples: Sequence[Sample] = ()
    ) -> list[list[float]]:
        """log p(token | those before it) of all tokens but the first. What an encoder reads of a sample is given: 0. Of ids
        alone an encoder-decoder reads all, and is asked to write them."""
        if "predict" in self.capabilities:
            raise CapabilityError(f"engine transformers gives no log-probabilities: the model's task is {self.bundle.task}")
        results: list[list[float]] = [[] for _ in sequences]
        for n, given, scores, ids in self._passes(sequences, adapter, samples):
            results[n] = [0.0] * given + scores.gather(-1, ids[:, None])[:, 0].tolist()
        return results

    def likeliest(
        self, sequences: Sequence[Sequence[int]], count: int, adapter: str | None = None
    ) -> list[list[list[tuple[int, float]]]]:
        """For each sequence of n ids, at the n - 1 places after its first id, the `count` likeliest ids and their
        log-probabilities, the likeliest first."""
        results: list[list[list[tuple[int, float]]]] = [[] for _ in sequences]
        for n, _, scores, _ in self._passes(sequences, adapter, ()):
            values, ids = scores.topk(min(count, scores.shape[-1]), dim=-1)
            results[n] = [list(zip(*pair, strict=True)) for pair in zip(ids.tolist(), values.tolist(), strict=True)]
        return results

    def _passes(
        self, sequences: Sequence[Sequence[int]], adapter: str | None, samples: Sequence[Sample]
    ) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
        """(number of the sequence, its first places that are only read, log-probabilities [places, vocabulary], ids there)."""
        alone = getattr(self.template, "alone", lambda ids: Sample(list(ids), [1.0] * len(ids)))
        whole = samples or [alone(ids) for ids in sequences]
        given = [(sample.label or {}).get("encoder", 0) if samples else 0 for sample in whole]
        lengths = [len(ids) - read for ids, read in zip(sequences, given, strict=True)]

        def logits(batch: Batch) -> torch.Tensor:
            with self._adapter(adapter), torch.inference_mode():
                found: torch.Tensor = self.model(**placed(batch.inputs, self.device, self.model.dtype), use_cache=False).logits
            return found

        for n, found, ids in self._scoring.passes(logits, whole, lengths):
            yield n, given[n], torch.log_softmax(found[:-1].float(), dim=-1), ids[1:].to(self.device)

    def embed(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return heads.embed(self, sequences)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        return heads.score(self, sequences)

    def predict(self, samples: Sequence[Sample]) -> list[dict[str, Any]]:
        """What a model with a head says of samples: see `heads.predict`."""
        return heads.predict(self, samples)

    def outputs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """All numbers that a model with a head gives for each sequence."""
        return heads.outputs(self, sequences)

    @contextmanager
    def _adapter(self, name: str | None) -> Iterator[None]:
        """The model for this thread alone, between two steps of the scheduler, with an adapter on."""
        self._ready()
        with self._exclusive(), self._adapters.on(name):
            yield

    @contextmanager
    def _exclusive(self, drain: bool = False) -> Iterator[None]:
        with self._started:
            scheduler = self._scheduler
        if scheduler is None:
            with self._started:  # nothing runs, and nothing can begin
                yield
            return
        with scheduler.exclusive(drain):
            yield
            pools.release()

    # --- adapters and weights -----------------------------------------------------------------------------------------

    def load_adapter(self, name: str, folder: Path) -> None:
        """Load a peft adapter's folder, while requests run. Raises RequestError when it does not fit."""
        self._ready()
        with self._exclusive(drain=name in self._adapters.names or begun_as(folder)):
            replaced = name in self._adapters.names
            with self._weights():
                self._adapters.load(name, folder)
            if self._runner is not None and self._adapters.only:
                self._runner.forget()
            elif self._runner is not None and replaced:
                self._runner.prefixes.forget(name)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter, when the requests that use it are finished; new ones are refused at once."""
        self._adapters.retire(name)
        if self._scheduler is not None:
            self._scheduler.wait_for(lambda rows: all(row.adapter != name or row.call.cancelled for row in rows))
        with self._exclusive(), self._weights():
            self._adapters.unload(name)
            if self._runner is not None:
                self._runner.prefixes.forget(name)

    def sync_weights(self, weights: Iterator[tuple[str, Any]], version: int) -> None:
        """Replace weights by name when what runs is finished; what waits is answered by the new ones."""
        with self._exclusive(drain=True), self._weights():
            own = self.model.state_dict()
            for name, tensor in weights:
                if name not in own:
                    raise RequestError(f"weight {name!r} is not one of the model's, {next(iter(own))} for example")
                own[name].copy_(tensor)
            self._version = version
            if self._runner is not None:
                self._runner.version = version
                self._runner.forget()

    def sleep(self) -> None:
        """Give the device's memory back, when what runs is finished; nothing is answered until `wake`."""
        with self._exclusive(drain=True):
            if self._awake_on is None:
                self._awake_on = self.device
                if self._runner is not None:
                    self._runner.forget()
                    self._runner.reset()
                self.model.to("cpu")

    def wake(self) -> None:
        with self._exclusive(drain=True):
            if self._awake_on is not None:
                self.model.to(self._awake_on)
                self._awake_on = None

    def close(self) -> None:
        """End what runs with an error, and let go of the model."""
        self._closed = True
        with self._started:
            scheduler, runner = self._scheduler, self._runner
        if scheduler is not None:
            scheduler.close()
        if runner is not None:
            runner.forget()
            runner.reset()
        self._adapters.rest()
        if self._adapters.model is not None:
            packed.unpack(self._adapters.model)
        self._adapters.model = None
