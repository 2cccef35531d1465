"""Rewards by what names them, and the scores that they give together: one code for `sample` and for trainers.

A reward is named by an installed reward's id, or in short by what it is made of: `metric:NAME`, `FILE.py:FUNCTION`, a reward
model's folder, `judge:http://HOST:PORT/v1`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import yaml
from swift_core.config import Component, RunConfig, build_options
from swift_core.errors import PluginError, RequestError, RunError, one_line
from swift_core.types import Reward, Row

FORMS = "metric:NAME, FILE.py:FUNCTION, a reward model's folder, judge:http://HOST:PORT/v1, or an installed reward's id"
Rewards = Sequence[tuple[str, float, Reward]]
"""The name, the weight and the reward of each."""


def make_rewards(
    part: Callable[..., Any], specs: Sequence[Any], stack: ExitStack, config: RunConfig | None = None
) -> list[tuple[str, float, Reward]]:
    """The name, the weight and the reward of each spec.

    part: `run.part`, or `session.part`. specs: texts, or mappings `{"name", "weight"?, "label"?, options...}`, also written as
    YAML; the label is its name in logs, by default `name`. stack: closes what is opened for them. config: by what reward
    models and judges are opened where `part` is a session's: its flags and its backend. Raises RequestError.
    """
    made: list[tuple[str, float, Reward]] = []
    for number, spec in enumerate(specs):
        name, label, weight, options = _read(spec, f"rewards.{number}")
        if any(label == other for other, _, _ in made):
            raise RequestError(f"reward {label}: given twice; set its weight, or give the two a label each")
        reward = _make(part, name, options, config)
        if hasattr(reward, "close"):
            stack.callback(reward.close)
        made.append((label, weight, reward))
    return made


def _read(spec: Any, address: str) -> tuple[str, str, float, dict[str, Any]]:
    if isinstance(spec, str) and spec.lstrip().startswith("{"):  # as typed on a command line
        try:
            spec = yaml.safe_load(spec)
        except yaml.YAMLError as err:
            raise RequestError(f"{address}: neither a name nor a mapping: {one_line(err)}") from None
    component = spec if isinstance(spec, Component) else Component.parse(spec, address)
    options = dict(component.options)
    name, given, label = component.name, options.pop("weight", 1.0), options.pop("label", None)
    if not name:
        raise RequestError(f"{address}: a reward needs a name: {FORMS}")
    try:
        weight = float(given)
    except (TypeError, ValueError):
        weight = math.nan
    if not math.isfinite(weight):
        raise RequestError(f"{address}.weight: expected a finite number, not {given!r}")
    return name, str(label or name), weight, options


def _make(part: Callable[..., Any], name: str, options: dict[str, Any], config: RunConfig | None) -> Reward:
    ident, given = resolve(name)
    options = given | options
    reward: Reward
    if config is not None and ident in ("model", "judge"):
        from swift_plugin_rewards import build
        from swift_plugin_rewards import config as classes

        cls, builder = {"model": (classes.ModelConfig, build.model), "judge": (classes.JudgeConfig, build.judge)}[ident]
        reward = builder(build_options(cls, options, f"reward.{ident}"), None, config)  # type: ignore[operator]
        return reward
    try:
        reward = part("reward", ident, **options)
    except PluginError:
        raise
    except RequestError as err:
        if given or not str(err).startswith("no part"):
            raise
        raise RequestError(f"reward {name}: {str(err).rstrip('.')}; expected {FORMS}") from None
    return reward


def resolve(name: str) -> tuple[str, dict[str, Any]]:
    """The id of a reward named in short, and the options that the name holds."""
    kind, _, rest = name.partition(":")
    if kind == "metric" and rest:
        return "metric", {"metric": rest}
    if kind == "judge" and rest:
        return "judge", {"address": rest}
    file, _, function = name.rpartition(":")
    if file.endswith(".py"):
        return "function", {"file": file, "function": function}
    if ("/" in name or "\\" in name or name[:1] in ".~" or (Path(name) / "config.json").is_file()) or (
        Path(name) / "plan.json"
    ).is_file():
        return "model", {"folder": name}
    return name, {}


def score(rewards: Rewards, completions: Sequence[str], rows: Sequence[Row]) -> list[dict[str, float | None]]:
    """For each answer its rewards by name, and their weighted sum as `score`.

    completions: texts, or `Answer`s. rows: of each completion, the row that it answers. A reward that does not judge a row
    gives None there, which is left out of the sum. Rewards that wait for a process or a server are asked at the same time.

    Raises ValueError where a reward cannot be had for a row, or none judges it, RunError where a reward gives something else
    than a finite number or None for each answer.
    """
    said, asked = list(completions), list(rows)
    if len(said) != len(asked):
        raise ValueError(f"{len(said)} answers for {len(asked)} rows")
    found: list[dict[str, float | None]] = [{} for _ in said]
    waiting = [name for name, _, reward in rewards if getattr(reward, "waits", False)]
    values: dict[str, list[Any]] = {}
    futures = {name: _asked(name, reward, said, asked) for name, _, reward in rewards if name in waiting}
    for name, _, reward in rewards:
        if name not in futures:
            values[name] = list(reward(said, asked))
    values |= {name: list(future.result()) for name, future in futures.items()}
    for name, _, _ in rewards:
        if len(values[name]) != len(said):
            raise RunError(f"reward {name}: {len(values[name])} scores for {len(said)} answers")
        for scores, value in zip(found, values[name], strict=True):
            scores[name] = _number(name, value)
    for number, scores in enumerate(found):
        judged = [(weight, scores[name]) for name, weight, _ in rewards if scores[name] is not None]
        if rewards and not judged:
            raise ValueError(f"no reward judges answer {number}: {', '.join(name for name, _, _ in rewards)} gave none")
        scores["score"] = math.fsum(weight * value for weight, value in judged if value is not None)
    return found


def _asked(name: str, reward: Reward, said: Sequence[str], rows: Sequence[Row]) -> Future[Any]:
    """A reward's scores, computed in a thread that ends with the process: one that hangs keeps no time-out from being told."""
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(reward(said, rows))
        except BaseException as err:  # told by who waits
            future.set_exception(err)

    threading.Thread(target=work, name=f"reward {name}", daemon=True).start()
    return future


def _number(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if hasattr(value, "item") and not isinstance(value, str):  # a number of numpy or torch
        with suppress(ValueError, RuntimeError):
            value = value.item()
    if isinstance(value, bool | int | float) and math.isfinite(value):
        return float(value)
    raise RunError(f"reward {name}: a score must be a finite number, or None, not {value!r}")
