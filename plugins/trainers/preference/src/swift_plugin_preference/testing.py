"""For tests: runs of the preference trainers on a tiny model, whole ones and the gradient of one step."""

from __future__ import annotations

import atexit
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from swift_core.config import build_options, parse_config
from swift_core.plan import Plan
from swift_core.session import Session
from swift_core.source import SampleList
from swift_core.types import Data, Run, Sample

from swift_plugin_preference.answers import AnswerTrainer
from swift_plugin_preference.config import CpoConfig, DpoConfig, KtoConfig, OrpoConfig, SimpoConfig
from swift_plugin_preference.forms import LabelledRows, PairRows
from swift_plugin_preference.pairs import PairTrainer

ASKED = ["how was the day at sea", "what is in the tin", "who sings", "why is it cold"]
BETTER = ["warm", "tea", "a kind choir", "snow"]
WORSE = ["grim", "no idea", "none", "it is not"]  # answers are short, so that sums in fp32 are near


def pair(asked: str, better: str, worse: str, system: str | None = None, **columns: Any) -> dict[str, Any]:
    prompt = [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": asked}]
    ends = [[*prompt, {"role": "assistant", "content": text}] for text in (better, worse)]
    return {"messages": ends[0], "rejected": ends[1], **columns}


PAIRS = [pair(*texts) for texts in zip(ASKED, BETTER, WORSE, strict=True)]
LABELLED = [
    {"messages": row["messages"] if good else row["rejected"], "label": good}
    for row, good in zip(PAIRS, (True, False, True, True), strict=True)
]


CONFIGS: dict[str, type] = {
    "dpo": DpoConfig, "orpo": OrpoConfig, "cpo": CpoConfig, "simpo": SimpoConfig, "kto": KtoConfig,
}  # fmt: skip


@dataclass
class Step:
    """One step's loss and gradients, and the batches that it was made of."""

    loss: float
    grads: dict[str, torch.Tensor]
    batches: list[Any] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)


def disturb(model: Any) -> None:
    """Move a model's weights a little, always the same, so that it is not its own reference."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


@cache
def _session(model: Path, rest: str) -> Session:
    """A session with a disturbed policy, kept for the tests that follow."""
    tree = {"model": str(model), "trainer": "dpo", "backend": {"name": "torch", "device": "cpu", "precision": "fp32"}}
    session = Session(parse_config(tree | json.loads(rest)))
    session.__enter__()
    atexit.register(session.__exit__, None, None, None)
    disturb(session.get("policy").model)
    return session


@contextmanager
def opened(model: Path, output: Path, trainer: str, **settings: Any) -> Iterator[Any]:
    """A trainer of a run without data, its policy disturbed. settings: the trainer's options, tuner and models."""
    rest = {key: settings.pop(key) for key in list(settings) if key in ("tuner", "models")}
    session = _session(model, json.dumps({"tuner": "full", **rest}, sort_keys=True))
    session.get("policy").model.zero_grad()
    template = session.template(session.model_ref, session.processor(session.model_ref))
    config = build_options(CONFIGS[trainer], settings, f"trainer.{trainer}")
    run = Run(
        session.config, config, Plan(), session.processor(session.model_ref), template, Data(SampleList(), SampleList(), {}),
        session.backend, session.events, session, output, resume_from=None, warm_start=None, part=session.part,
        engine=session.policy_engine,
    )  # fmt: skip
    yield AnswerTrainer(run) if trainer == "kto" else PairTrainer(trainer, run)


def encoded(trainer: Any, rows: list[dict[str, Any]]) -> list[Sample]:
    form = LabelledRows() if isinstance(trainer, AnswerTrainer) else PairRows()
    return [sample for row in rows for sample in form.encode(trainer.run.template, row)]


def step(
    model: Path, output: Path, trainer: str, rows: list[dict[str, Any]], flat: bool = True, shares: bool = True,
    passes: int = 1, **settings: Any,
) -> Step:  # fmt: skip
    """The loss and the gradients of one step over the rows, in so many passes."""
    with opened(model, output, trainer, **settings) as made:
        samples = encoded(made, rows)
        policy = made.run.models.get("policy")
        steps = made.run.backend.prepare({"policy": policy} | made._roles(), None, made.config)
        made.flat, made.shares = flat, shares
        size = len(samples) // passes
        batches = [b for at in range(0, len(samples), size) for b in made._batches(samples[at : at + size])]
        made._ready(steps, batches)
        result = steps.forward_backward(batches, made.loss_fn)
        grads = {name: p.grad.clone() for name, p in policy.trainable().items() if p.grad is not None}
        made._extra()
        return Step(result.loss, grads, batches, made.reported)


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of gradients, as a share of the largest one of each weight, at least 1."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max() / max(1.0, float(other[name].abs().max()))) for name in one)
