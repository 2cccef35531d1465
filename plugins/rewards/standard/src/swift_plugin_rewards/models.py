"""A metric and a reward model as rewards."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from swift_core.config import Component, RunConfig
from swift_core.errors import RequestError
from swift_core.events import EventSink
from swift_core.models import resolve_model
from swift_core.session import Session
from swift_core.types import Metric, Row

from swift_plugin_rewards.asking import reference_of, split_reference


class Reference:
    """A metric against the row's own answer."""

    def __init__(self, metric: Metric, name: str) -> None:
        self.metric, self.name = metric, name

    def __call__(self, completions: list[str], rows: list[Row]) -> list[float]:
        """Raises ValueError for a row without an answer of its own."""
        found = []
        for said, row in zip(completions, rows, strict=True):
            reference = split_reference(row)[1] if row.get("messages") else None
            reference = reference_of(row) if reference is None else reference
            if reference is None:
                raise ValueError(f"reward {self.name}: the row has no answer of its own to compare with")
            found.append(float(self.metric(said, reference)))
        return found


class RewardModel:
    """A model with one number as its head: it reads the conversation with the answer at its end."""

    def __init__(self, folder: str, name: str, config: RunConfig, device: str | None = None) -> None:
        """device: where it runs; None is as the run's backend says. Raises RequestError for a folder of another kind."""
        self.name, self._stack = name, ExitStack()
        session = Session(config, EventSink())
        ref = resolve_model(session.registry, Component(folder))
        template = Component() if ref.plan else Component("reward")
        backend = Component("torch", options={"device": device}) if device else replace(config.backend)
        backend.options = {**backend.options, "processes": 1}  # a rank of a run has its own
        config = replace(
            config, model=Component(folder), template=template, engine=Component("transformers"), dataset=[], models={},
            backend=backend, quantizer=Component(),
        )  # fmt: skip
        try:
            session = self._stack.enter_context(Session(config, EventSink(), session.registry))
            self.opened = session.opened()
            if "score" not in self.opened.engine.capabilities or not hasattr(self.opened.template, "sample"):
                raise RequestError(
                    f"reward {folder}: this model gives no score: expected one trained with --trainer reward, or its like"
                )
        except BaseException:
            self._stack.close()
            raise

    def __call__(self, completions: list[str], rows: list[Row]) -> list[float]:
        template: Any = self.opened.template
        sequences = []
        for said, row in zip(completions, rows, strict=True):
            messages = [*split_reference(row)[0], {"role": "assistant", "content": str(said)}]
            shown = {"messages": messages, **({"tools": row["tools"]} if row.get("tools") else {})}
            sequences.append(template.sample(shown, labelled=False).input_ids)
        return list(self.opened.engine.score(sequences))

    def close(self) -> None:
        self._stack.close()
