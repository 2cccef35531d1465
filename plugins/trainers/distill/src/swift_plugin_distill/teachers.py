"""Who teaches: a model beside the policy, the policy itself with what is tuned off, or a model behind an address."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from swift_core.config import Component
from swift_core.errors import CapabilityError, RequestError, SwiftError
from swift_core.events import EventSink
from swift_core.session import Session
from swift_core.types import Batch, Run, Sample, TunedModel

from swift_plugin_distill.divergence import Likeliest, likeliest

ROLE = "teacher"


class ModelTeacher:
    """A role of the run. What it tells of a batch are its outputs, or with `top_k` its likeliest tokens."""

    def __init__(self, tuned: TunedModel, config: Any) -> None:
        self.tuned, self.config = tuned, config

    def roles(self) -> dict[str, TunedModel]:
        return {ROLE: self.tuned}

    def tell(self, steps: Any, batch: Batch, samples: Sequence[Sample], width: int) -> Any:
        outputs = steps.forward(ROLE, batch)
        config = self.config
        return likeliest(outputs, config.top_k, config.temperature, width, config.chunk) if config.top_k else outputs


class ServerTeacher:
    """A model behind an OpenAI-compatible address that tells its likeliest ids of a prompt, as vLLM does."""

    def __init__(self, engine: Any, address: str, top_k: int) -> None:
        self.engine, self.address, self.top_k = engine, address, top_k

    def roles(self) -> dict[str, TunedModel]:
        return {}

    def tell(self, steps: Any, batch: Batch, samples: Sequence[Sample], width: int) -> Likeliest:
        """Raises RequestError for a server that knows an id which the model does not have: it has another vocabulary."""
        try:
            found = self.engine.likeliest([sample.input_ids for sample in samples], self.top_k)
        except (RequestError, CapabilityError) as err:
            what = "its server must tell prompt_logprobs, as vllm serve does"
            raise RequestError(f"models.teacher {self.address}: {str(err).rstrip('.')}; {what}") from err
        places = [
            places[n - 1]
            for sample, places in zip(samples, found, strict=True)
            for n, weight in enumerate(sample.weights) if weight and n
        ]  # fmt: skip
        if any(len(place) < self.top_k for place in places):
            raise RequestError(
                f"models.teacher {self.address} tells {min(map(len, places))} likeliest tokens, and trainer.top_k is "
                f"{self.top_k}: lower it, or let the server tell more (vLLM: --max-logprobs)"
            )
        ids = torch.tensor([[token for token, _ in place] for place in places]).view(-1, self.top_k)
        if len(ids) and int(ids.max()) >= width:
            raise RequestError(
                f"models.teacher {self.address} has another vocabulary than the model: it tells of token {int(ids.max())}, and "
                f"the model has {width}; {OTHERWISE}"
            )
        return Likeliest(ids, torch.tensor([[value for _, value in place] for place in places]).view(-1, self.top_k))


OTHERWISE = "take a teacher of the same family, or learn from its answers: swift-core sample, then trainer sft"


def open_teacher(run: Run, stack: ExitStack) -> ModelTeacher | ServerTeacher:
    """The teacher that a run names. Raises RequestError where there is none, or where it knows other tokens."""
    config, named = run.trainer_config, run.config.models.get(ROLE)
    if config.teacher == "self":
        for role in (ROLE, "reference"):
            if role in run.config.models:
                raise RequestError(f"trainer.teacher=self: models.{role} names another model; leave one of them out")
        return ModelTeacher(run.models.get("reference"), config)
    if named is None or named.name is None:
        raise RequestError(
            "trainer gkd needs a teacher: models.teacher=FOLDER, models.teacher=http://HOST:PORT/v1, or trainer.teacher=self"
        )
    if named.name.startswith(("http://", "https://")):
        return _server(run, named, stack)
    tuned = run.models.get(ROLE)
    bundle = getattr(tuned, "bundle", None)
    if bundle is not None:
        if bundle.task != "causal_lm":
            raise RequestError(f"models.teacher {named.name} has a head for {bundle.task}: a teacher must generate text")
        check_vocabulary(run.processor, bundle.processor, named.name)
    return ModelTeacher(tuned, config)


def _server(run: Run, named: Component, stack: ExitStack) -> ServerTeacher:
    config, address = run.trainer_config, str(named.name)
    if not config.top_k:
        raise RequestError(f"models.teacher {address}: a server tells its likeliest tokens only: set trainer.top_k, 20 say")
    if config.temperature != 1:
        raise RequestError(
            f"models.teacher {address}: a server tells probabilities of temperature 1: leave out trainer.temperature"
        )
    engine = Component("openai", options=dict(named.options))
    given = replace(run.config, model=Component(address), engine=engine, dataset=[], models={})
    try:
        opened = stack.enter_context(Session(given, EventSink())).opened()
    except SwiftError as err:
        raise type(err)(f"models.teacher {address}: {err}") from None
    if not hasattr(opened.engine, "likeliest"):
        raise CapabilityError(f"models.teacher {address}: engine openai of this version does not tell likeliest tokens")
    return ServerTeacher(opened.engine, address, config.top_k)


def check_vocabulary(mine: Any, theirs: Any, name: str) -> None:
    """Raises RequestError where two tokenizers do not mean the same by their ids."""
    own, other = (_vocabulary(processor) for processor in (mine, theirs))
    if own == other:
        return
    differ = next((token for token in sorted(own, key=own.__getitem__) if other.get(token) != own[token]), None)
    if differ is None:
        differ = next(token for token in other if token not in own)
    raise RequestError(
        f"models.teacher {name} has another vocabulary than the model: {len(other)} tokens against {len(own)}, and {differ!r} "
        f"is {other.get(differ, 'unknown')} there and {own.get(differ, 'unknown')} here, so that their probabilities cannot be "
        f"compared: {OTHERWISE}"
    )


def _vocabulary(processor: Any) -> dict[str, int]:
    tokenizer = getattr(processor, "tokenizer", processor)
    found: dict[str, int] = tokenizer.get_vocab()
    return found
