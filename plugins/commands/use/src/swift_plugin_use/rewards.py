"""What scores the answers of `sample`: a metric, a Python function, a reward model, a judge, or a plugin's reward, by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from swift_core.config import Component
from swift_core.errors import PluginError, RequestError, RunError, SwiftError, one_line
from swift_core.events import EventSink
from swift_core.models import resolve_model
from swift_core.session import Session
from swift_core.types import Metric, Reward, Row

from swift_plugin_use.answers import split_reference
from swift_plugin_use.judge import Judge
from swift_plugin_use.tools import load_module

FORMS = "metric:NAME, FILE.py:FUNCTION, a reward model's folder, judge:http://HOST:PORT/v1, or an installed reward's id"


def make_reward(session: Session, spec: str, stack: ExitStack, prompt: str, judge_model: str | None) -> Reward:
    """The reward that a text names. stack: closes what is opened for it. Raises RequestError."""
    kind, _, rest = spec.partition(":")
    if kind == "metric" and rest:
        return Reference(session.part("metric", rest), spec)
    if kind == "judge" and rest:
        return Judge(_open_judge(session, rest, stack, judge_model), prompt, rest)
    file, _, name = spec.rpartition(":")
    if file.endswith(".py"):
        return Function(_function(file, name, spec), spec)
    if Path(spec).expanduser().is_dir():
        return RewardModel(_open_model(session, str(Path(spec).expanduser()), stack), spec)
    try:
        reward: Reward = session.part("reward", spec)
    except PluginError:
        raise
    except RequestError as err:
        raise RequestError(f"--reward {spec}: {err}; expected {FORMS}") from None
    return reward


class Reference:
    """A metric against the row's own answer."""

    def __init__(self, metric: Metric, name: str) -> None:
        self.metric, self.name = metric, name

    def __call__(self, completions: list[str], rows: list[Row]) -> list[float]:
        found = []
        for said, row in zip(completions, rows, strict=True):
            reference = split_reference(row)[1]
            if reference is None:
                raise ValueError(f"reward {self.name}: the row has no answer of its own to compare with")
            found.append(float(self.metric(said, reference)))
        return found


class Function:
    """A user's function of completions and rows."""

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.function, self.name = function, name

    def __call__(self, completions: list[str], rows: list[Row]) -> list[float]:
        try:
            return list(self.function(completions, rows))
        except Exception as err:
            raise RunError(f"reward {self.name}: {one_line(err)}") from err


class RewardModel:
    """A model with one number as its head: it reads the conversation with the answer at its end."""

    def __init__(self, opened: Any, name: str) -> None:
        self.opened, self.name = opened, name

    def __call__(self, completions: list[str], rows: list[Row]) -> list[float]:
        sequences = []
        for said, row in zip(completions, rows, strict=True):
            messages = [*split_reference(row)[0], {"role": "assistant", "content": said}]
            shown = {"messages": messages, **({"tools": row["tools"]} if row.get("tools") else {})}
            sequences.append(self.opened.template.sample(shown, labelled=False).input_ids)
        return list(self.opened.engine.score(sequences))


def score_all(rewards: dict[str, Reward], weights: list[float], completions: list[str], row: Row) -> list[dict[str, float]]:
    """For each answer to a row its rewards by name, and their weighted sum as `score`.

    Raises ValueError where one cannot be had for this row, RunError where a reward gives something else than a number for each.
    """
    found: list[dict[str, float]] = [{} for _ in completions]
    for name, reward in rewards.items():
        values = list(reward(list(completions), [row] * len(completions)))
        if len(values) != len(completions):
            raise RunError(f"reward {name}: {len(values)} scores for {len(completions)} answers")
        for scores, value in zip(found, values, strict=True):
            if isinstance(value, bool | int | float) and math.isfinite(value):
                scores[name] = float(value)
                continue
            raise RunError(f"reward {name}: a score must be a finite number, not {value!r}")
    for scores in found:
        scores["score"] = math.fsum(weight * scores[name] for name, weight in zip(rewards, weights, strict=True))
    return found


def _function(file: str, name: str, spec: str) -> Callable[..., Any]:
    path = Path(file).expanduser()
    if not path.is_file():
        raise RequestError(f"--reward {spec}: no file {file}")
    function = getattr(load_module(path, "--reward"), name, None)
    if not callable(function):
        raise RequestError(f"--reward {spec}: {file} has no function {name!r}")
    return function


def _open_judge(session: Session, address: str, stack: ExitStack, model: str | None) -> Any:
    engine = Component("openai", options={"model": model} if model else {})
    config = replace(session.config, model=Component(address), engine=engine, dataset=[])
    try:
        return stack.enter_context(Session(config, EventSink(), session.registry)).opened().engine
    except SwiftError as err:
        raise type(err)(f"--reward judge:{address}: {err}") from None


def _open_model(session: Session, folder: str, stack: ExitStack) -> Any:
    ref = resolve_model(session.registry, Component(folder))
    template = Component() if ref.plan else Component("reward")
    config = replace(session.config, model=Component(folder), template=template, engine=Component("transformers"), dataset=[])
    opened = stack.enter_context(Session(config, EventSink(), session.registry)).opened()
    if "score" not in opened.engine.capabilities or not hasattr(opened.template, "sample"):
        raise RequestError(
            f"--reward {folder}: this model gives no score: expected one trained with --trainer reward, or its like"
        )
    return opened
