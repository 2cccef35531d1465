"""Rewards of rollouts: by the run's reward parts, by the environment, and what a long answer costs.

Shapes: P prompts, G answers to each, R rewards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from swift_core.errors import PluginError, RequestError, RunError, SwiftError, one_line
from swift_core.types import Sample, Template
from swift_plugin_rewards.answer import Answer
from swift_plugin_rewards.make import make_rewards, score

from swift_plugin_grpo.advantages import soft_overlong
from swift_plugin_grpo.environments import read_answer
from swift_plugin_grpo.rollouts import Rollout

ENVIRONMENT, OVERLONG = "environment", "overlong"  # columns beside the rewards' own names


@dataclass(slots=True)
class Scored:
    """A rollout with what it is worth. Log-probabilities are of its own tokens [N]."""

    rollout: Rollout
    scores: dict[str, float | None] = field(default_factory=dict)  # by reward
    score: float = 0.0  # their weighted sum
    advantage: float = 0.0
    live: bool = True  # it can have a gradient
    old: torch.Tensor | None = None
    plain: torch.Tensor | None = None  # those of `old` at temperature 1, as the engine tells its own
    reference: torch.Tensor | None = None
    entropies: torch.Tensor | None = None


@dataclass(slots=True)
class Group:
    """The answers to one prompt, and the good answer that its row ends with where supervised training is mixed in."""

    number: int
    answers: list[Scored]
    expert: Sample | None = None


class Scoring:
    """The rewards of a run. Raises RequestError for one that is not there, or where nothing rewards."""

    def __init__(
        self, part: Callable[..., Any], specs: Sequence[Any], config: Any, template: Template, stack: ExitStack
    ) -> None:
        if not specs and not config.environment:
            raise RequestError(
                "trainer.rewards is missing: an installed reward's id, or a function of yours, trainer.rewards=FILE.py:FUNCTION"
            )
        self.rewards = make_rewards(part, labelled(specs), stack)
        self.config, self.template = config, template
        self.weights = {name: weight for name, weight, _ in self.rewards}
        for name, there in ((ENVIRONMENT, config.environment), (OVERLONG, getattr(config, "overlong_margin", 0))):
            if there:
                self.weights[name] = 1.0

    def __call__(self, groups: Sequence[Sequence[Rollout]]) -> list[Group]:
        """All groups scored. Raises RunError, with what failed and on which prompt, where a reward fails."""
        flat = [rollout for group in groups for rollout in group]
        found: list[dict[str, float | None]] = [{} for _ in flat]
        if self.rewards and flat:
            try:
                found = score(self.rewards, [self.answer(rollout) for rollout in flat], [rollout.told() for rollout in flat])
            except (RunError, PluginError):
                raise
            except (SwiftError, ValueError) as err:
                raise RunError(f"rewards: {err}") from err
            except Exception as err:
                raise RunError(f"a reward failed: {one_line(err)}") from err
        answers = iter([self._scored(rollout, scores) for rollout, scores in zip(flat, found, strict=True)])
        return [Group(group[0].prompt, [next(answers) for _ in group]) for group in groups]

    def answer(self, rollout: Rollout) -> Answer:
        """The last answer as rewards get it: its text, and beside it its ids, its end and its message."""
        if rollout.messages:
            message = next(message for message in reversed(rollout.messages) if message["role"] == "assistant")
            return Answer(str(message.get("content") or ""), rollout.text, rollout.last_ids, rollout.finish, message)
        start = len(rollout.ids) - len(rollout.last_ids)
        message = read_answer(self.template, rollout.ids[:start], rollout.last_ids, rollout.text, rollout.row.get("tools"))
        text = str(message.get("content") or "")
        if not text and not message.get("tool_calls"):
            text = rollout.text  # all of it is reasoning that never ended
        return Answer(text, rollout.text, rollout.last_ids, rollout.finish, message)

    def _scored(self, rollout: Rollout, scores: dict[str, float | None]) -> Scored:
        total = float(scores.pop("score", 0.0) or 0.0)
        if rollout.reward is not None:
            scores[ENVIRONMENT] = rollout.reward
            total += rollout.reward
        if OVERLONG in self.weights:
            config = self.config
            scores[OVERLONG] = float(soft_overlong(torch.tensor([rollout.length]), config.max_tokens, config.overlong_margin))
            total += scores[OVERLONG] or 0.0
        return Scored(rollout, scores, total)

    def table(self, groups: Sequence[Sequence[dict[str, float | None]]]) -> torch.Tensor:
        """Each answer's rewards [P, G, R] in the order of `weights`, NaN where one does not judge the row."""
        nan = float("nan")

        def value(scores: dict[str, float | None], name: str) -> float:
            return nan if scores.get(name) is None else float(scores[name] or 0.0)

        return torch.tensor([[[value(scores, name) for name in self.weights] for scores in group] for group in groups])


def labelled(specs: Sequence[Any]) -> list[Any]:
    """Rewards with short names for logs: a function of a file goes by its own name, where no other has it."""
    names = [spec.rpartition(":")[2] if isinstance(spec, str) and ".py:" in spec else None for spec in specs]
    return [
        {"name": spec, "label": name} if name and names.count(name) == 1 else spec
        for spec, name in zip(specs, names, strict=True)
    ]
