"""The engine `transformers`: batched and streaming generation, log-probabilities and adapters, in this process."""

from __future__ import annotations

import queue
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from swift_core.errors import CapabilityError, RequestError
from swift_core.types import Completion, ModelBundle, Request, Sample
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from swift_plugin_torch import heads
from swift_plugin_torch.config import TransformersEngineConfig
from swift_plugin_torch.positions import own_positions
from swift_plugin_torch.prompts import make_inputs, placed, settings, text_ids


class TransformersEngine:
    """Runs a bundle's model with `generate`. Requests with the same settings are batched, shortest prompts first."""

    capabilities: frozenset[str] = frozenset({"stream", "adapters", "sync", "sleep"})

    def __init__(self, bundle: ModelBundle, config: TransformersEngineConfig) -> None:
        if bundle.template is None:
            raise RequestError("the engine needs a bundle with its template")
        self.bundle, self.template, self.config = bundle, bundle.template, config
        self.tokenizer = getattr(bundle.processor, "tokenizer", bundle.processor)
        if getattr(self.template, "media", None) is not None:
            self.capabilities |= {"media"}
        self.capabilities |= heads.CAPABILITIES.get(bundle.task, set())
        self.model = bundle.model.eval()
        self.adapters: set[str] = set()
        self.only: str | None = None  # an adapter beside which there is no base
        # A model that comes tuned is served as it comes: its own adapter stays on where a request names none.
        self.own = str(self.model.active_adapter) if hasattr(self.model, "peft_config") else None
        self.version = 0

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def generate(self, requests: Sequence[Request], stream: bool = False) -> Iterator[Completion]:
        prompts = [self._prompt(request) for request in requests]
        if stream:
            for index, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
                yield from self._stream(index, request, prompt)
            return
        groups: dict[Any, list[int]] = {}
        for index in sorted(range(len(requests)), key=lambda n: len(prompts[n])):
            groups.setdefault(settings(requests[index]), []).append(index)
        for indexes in groups.values():
            for start in range(0, len(indexes), self.config.batch_size):
                chosen = indexes[start : start + self.config.batch_size]
                yield from self._batch(chosen, [requests[n] for n in chosen], [prompts[n] for n in chosen])

    def _batch(self, indexes: list[int], requests: list[Request], prompts: list[list[int]]) -> Iterator[Completion]:
        request = requests[0]
        inputs = self._inputs(requests, prompts)
        width, counts = inputs["input_ids"].shape[1], inputs["attention_mask"].sum(1).tolist()
        with self._prepared(request):
            made = self.model.generate(**inputs, generation_config=self._generation(request), **self._for_stops(request))
        logits = torch.stack(made.logits, dim=1).float()  # [B, new, vocabulary]
        new = made.sequences[:, width:]
        logprobs = torch.log_softmax(logits, dim=-1).gather(-1, new[..., None])[..., 0]
        for index, count, row, scores in zip(indexes, counts, new.tolist(), logprobs.tolist(), strict=True):
            yield self._finish(index, request, count, row, scores)

    def _inputs(self, requests: list[Request], prompts: list[list[int]]) -> dict[str, torch.Tensor]:
        inputs = placed(make_inputs(self.template, requests, prompts, self._pad()), self.device, self.model.dtype)
        return inputs | own_positions(self.model, inputs)

    def _finish(self, index: int, request: Request, prompted: int, ids: list[int], scores: list[float]) -> Completion:
        """The completion of new `ids` after `prompted` tokens."""
        stops = set(self.template.stop_ids())
        count = next((n + 1 for n, token in enumerate(ids) if token in stops), len(ids))
        finish = "stop" if count and ids[count - 1] in stops else "length"
        text = self.template.decode(ids[:count])
        cut = min((text.index(stop) for stop in request.stop if stop in text), default=None)
        if cut is not None:
            # What follows the token that completed the stop string is padding, written while others of the batch went on.
            ends = (n for n in range(1, count + 1) if any(stop in self.template.decode(ids[:n]) for stop in request.stop))
            count, text, finish = next(ends, count), text[:cut], "stop"
        return Completion(index, text, ids[:count], scores[:count], finish, prompted, self.version)

    def _stream(self, index: int, request: Request, prompt: list[int]) -> Iterator[Completion]:
        """Pieces of text as tokens come, then the whole completion."""
        inputs = self._inputs([request], [prompt])
        prompted = inputs["input_ids"].shape[1]
        tokens: queue.Queue[int | BaseException | None] = queue.Queue()
        stopped = threading.Event()

        class Streamer(BaseStreamer):
            prompt_seen = False

            def put(self, value: torch.Tensor) -> None:
                if stopped.is_set():
                    raise _Stopped
                if self.prompt_seen:
                    tokens.put(int(value.flatten()[0]))
                self.prompt_seen = True

            def end(self) -> None:
                tokens.put(None)

        def work() -> None:
            try:
                with self._prepared(request):
                    self.model.generate(
                        **inputs, generation_config=self._generation(request), streamer=Streamer(), **self._for_stops(request)
                    )
            except BaseException as err:  # handed to the reader
                tokens.put(err)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        ids: list[int] = []
        shown = ""
        try:
            while (token := tokens.get()) is not None:
                if isinstance(token, BaseException):
                    raise token
                ids.append(token)
                so_far = self._finish(index, request, prompted, ids, [])
                whole = so_far.text if so_far.finish == "stop" else _without_begun_stop(so_far.text, request.stop)
                if whole.startswith(shown) and not whole.endswith("\ufffd"):  # a character may take several tokens
                    yield Completion(index, whole[len(shown) :], [token])
                    shown = whole
        finally:
            stopped.set()
            worker.join()
        # The full text again, from all ids; log-probabilities are not kept while streaming.
        yield self._finish(index, request, prompted, ids, [])

    def logprobs(
        self, sequences: Sequence[Sequence[int]], adapter: str | None = None, *, samples: Sequence[Sample] = ()
    ) -> list[list[float]]:
        if "predict" in self.capabilities:
            raise CapabilityError(f"engine transformers gives no log-probabilities: the model's task is {self.bundle.task}")
        results: list[list[float]] = [[] for _ in sequences]
        whole = samples or [Sample(list(ids), [1.0] * len(ids)) for ids in sequences]
        order = sorted(range(len(sequences)), key=lambda n: len(sequences[n]))
        for start in range(0, len(order), self.config.batch_size):
            chosen = order[start : start + self.config.batch_size]
            inputs = placed(self.template.collate([whole[n] for n in chosen]).inputs, self.device, self.model.dtype)
            ids = inputs["input_ids"]
            with torch.inference_mode(), self._adapter(adapter):
                logits = self.model(**inputs, use_cache=False).logits
                for row, n in enumerate(chosen):
                    count = len(sequences[n])
                    scores = torch.log_softmax(logits[row, : count - 1].float(), dim=-1)
                    results[n] = scores.gather(-1, ids[row, 1:count, None])[:, 0].tolist()
        return results

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

    def load_adapter(self, name: str, folder: Path) -> None:
        """Load a peft adapter's folder. Raises RequestError when it does not fit."""
        from peft import PeftConfig, PeftModel

        if name == self.own:
            raise RequestError(f"adapter {name!r} is the model's own; give {folder} another name")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", "Found missing adapter keys")  # a part left as it was begun: no adapter at all
                start = getattr(PeftConfig.from_pretrained(str(folder)), "init_lora_weights", None)
                if isinstance(self.model, PeftModel):
                    self.model.load_adapter(str(folder), adapter_name=name)
                else:
                    self.model = PeftModel.from_pretrained(self.model, str(folder), adapter_name=name).eval()
        except Exception as err:
            raise RequestError(f"adapter {folder} cannot be loaded: {' '.join(str(err).split())}") from err
        if str(start).startswith(("pissa", "olora", "corda")):  # a part of the base's weights went into the adapter
            self.only = name
        self.adapters.add(name)

    def unload_adapter(self, name: str) -> None:
        if name not in self.adapters:
            raise RequestError(f"adapter {name!r} is not loaded; loaded: {', '.join(sorted(self.adapters)) or 'none'}")
        self.model.delete_adapter(name)
        self.adapters.discard(name)
        if self.only == name:
            self.only = None

    def sync_weights(self, weights: Iterator[tuple[str, Any]], version: int) -> None:
        own = self.model.state_dict()
        for name, tensor in weights:
            own[name].copy_(tensor)
        self.version = version

    def sleep(self) -> None:
        self._awake_on = self.device
        self.model.to("cpu")

    def wake(self) -> None:
        self.model.to(self._awake_on)

    def close(self) -> None:
        self.model = None

    def _prompt(self, request: Request) -> list[int]:
        if request.adapter is not None and request.adapter not in self.adapters:
            raise RequestError(
                f"adapter {request.adapter!r} is not loaded; loaded: {', '.join(sorted(self.adapters)) or 'none'}"
            )
        return text_ids(self.template, request)

    def _generation(self, request: Request) -> GenerationConfig:
        sampling = request.temperature > 0
        options: dict[str, Any] = {"do_sample": False}
        if sampling:
            options = {"do_sample": True, "temperature": request.temperature, "top_p": request.top_p, "top_k": request.top_k}
        return GenerationConfig(
            max_new_tokens=request.max_tokens, repetition_penalty=request.repetition_penalty, pad_token_id=self._pad(),
            eos_token_id=self.template.stop_ids(), stop_strings=request.stop or None, return_dict_in_generate=True,
            output_logits=True, **options,
        )  # fmt: skip

    def _for_stops(self, request: Request) -> dict[str, Any]:
        """What finding stop strings needs; a few models take no such argument."""
        return {"tokenizer": self.tokenizer} if request.stop else {}

    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else (self.template.stop_ids() or [0])[0])

    @contextmanager
    def _prepared(self, request: Request) -> Iterator[None]:
        """No gradients, the request's adapter, and its seed where it has one."""
        fork = torch.random.fork_rng() if request.seed is not None else nullcontext()
        with torch.inference_mode(), self._adapter(request.adapter), fork:
            if request.seed is not None:
                torch.manual_seed(request.seed)
            yield

    @contextmanager
    def _adapter(self, name: str | None) -> Iterator[None]:
        if self.only and name != self.only:
            raise RequestError(f"adapter {self.only!r} holds a part of the base's weights; nothing is served beside it")
        if not self.adapters:
            yield
        elif name is None and self.own is None:
            with self.model.disable_adapter():
                yield
        else:
            self.model.set_adapter(name or self.own)
            yield


class _Stopped(Exception):
    """The reader of a stream went away."""


def _without_begun_stop(text: str, stops: Sequence[str]) -> str:
    """`text` without an ending that may turn out to begin a stop string."""
    begun = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return text[: len(text) - max(begun, default=0)]
