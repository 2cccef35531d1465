"""Figures of a step over all ranks, for the log: rewards, signal, divergence, entropy, clipping, lengths, staleness, times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from swift_plugin_grpo.advantages import has_signal
from swift_plugin_grpo.scoring import Group, Scored


@dataclass(slots=True)
class Told:
    """What all ranks know of one answer."""

    scores: dict[str, float | None]
    score: float
    length: int
    truncated: bool
    version: int
    turns: int
    surprise: float  # sum over own tokens of -log p, by the engine
    kl: float = 0.0  # summed over own tokens: what is taken from the reward


@dataclass(slots=True)
class ToldGroup:
    """What all ranks know of a group. expert: weight of the tokens of its row's own answer."""

    number: int
    answers: list[Told]
    expert: float = 0.0


def tell(group: Group) -> ToldGroup:
    """A group as other ranks need it."""
    expert = sum(group.expert.weights[1:]) if group.expert is not None else 0.0
    return ToldGroup(group.number, [_told(answer) for answer in group.answers], expert)


def _told(answer: Scored) -> Told:
    rollout = answer.rollout
    kl = 0.0
    if answer.old is not None and answer.reference is not None:
        kl = float((answer.old - answer.reference).sum())
    return Told(
        answer.scores,
        answer.score,
        rollout.length,
        rollout.truncated,
        rollout.version,
        rollout.turns,
        -sum(rollout.logprobs),
        kl,
    )


def signal(group: ToldGroup) -> bool:
    """Whether the answers to a prompt differ in reward."""
    return bool(has_signal(torch.tensor([[answer.score for answer in group.answers]]))[0])


def figures(drawn: Sequence[ToldGroup], version: int) -> dict[str, float]:
    """Of all groups drawn in a step. version: of the weights that are trained on."""
    answers = [answer for group in drawn for answer in group.answers]
    tokens = sum(answer.length for answer in answers)
    found = {
        "reward": mean([answer.score for answer in answers]),
        "reward_std": deviation([answer.score for answer in answers]),
    }
    for name in answers[0].scores:
        values = [answer.scores[name] for answer in answers]
        judged = [value for value in values if value is not None]
        found[f"reward/{name}"] = mean(judged)
        found[f"reward_std/{name}"] = deviation(judged)
    return found | {
        "no_signal": mean([float(not signal(group)) for group in drawn]),
        "length": tokens / len(answers),
        "length_max": float(max(answer.length for answer in answers)),
        "truncated": mean([float(answer.truncated) for answer in answers]),
        "empty": mean([float(answer.length == 0) for answer in answers]),
        "turns": mean([float(answer.turns) for answer in answers]),
        "staleness": mean([float(version - answer.version) for answer in answers]),
        "entropy": sum(answer.surprise for answer in answers) / tokens if tokens else math.nan,
    }


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def deviation(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    middle = mean(values)
    return math.sqrt(sum((value - middle) ** 2 for value in values) / (len(values) - 1))


class Sums:
    """Sums over the tokens of a step's passes, of this rank, as losses tell them."""

    def __init__(self) -> None:
        self.tokens, self.values = 0, dict[str, float]()

    def add(self, tokens: int, values: dict[str, float]) -> None:
        self.tokens += tokens
        for name, value in values.items():
            own = self.values.get(name, 0.0)
            self.values[name] = max(own, value) if name.endswith("_max") else own + value

    @staticmethod
    def means(sums: Sequence[Sums]) -> dict[str, float]:
        """Of all ranks together: means over tokens, and greatest values."""
        whole = Sums()
        for own in sums:
            whole.add(own.tokens, own.values)
        count = max(whole.tokens, 1)
        return {name: value if name.endswith("_max") else value / count for name, value in whole.values.items()}


def sample_rows(groups: Sequence[Group], prompts: dict[int, str], count: int) -> list[list[Any]]:
    """Rows of the report's table: the best and the worst answers of the first groups."""
    rows: list[list[Any]] = []
    for group in groups:
        if len(rows) >= count:
            break
        order = sorted(group.answers, key=lambda answer: -answer.score)
        for answer in [order[0], order[-1]] if len(order) > 1 else order:
            rollout = answer.rollout
            said = rollout.text
            if rollout.messages:
                said = "\n".join(
                    f"{message['role']}: {message.get('content') or message.get('tool_calls')}" for message in rollout.messages
                )
            rewards = ", ".join(f"{name} {value:.3g}" for name, value in answer.scores.items() if value is not None)
            rows.append(
                [
                    prompts.get(group.number, ""),
                    said,
                    round(answer.score, 4),
                    rewards,
                    round(answer.advantage, 4),
                    rollout.length,
                    rollout.finish,
                ]
            )
    return rows[:count]


COLUMNS = ["prompt", "answer", "reward", "rewards", "advantage", "tokens", "end"]
CHARTS = [
    "reward", "reward_std", "no_signal", "kl", "entropy", "clip_low", "clip_high", "length", "truncated", "turns", "staleness",
    "mismatch", "grad_norm",
]  # fmt: skip
"""Figures that the report draws."""
