"""The pure functions of a step, by value."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from swift_plugin_supervised.schedule import learning_rate, total_steps


def rates(steps: int, **options: Any) -> list[float]:
    config = SimpleNamespace(**{"learning_rate": 8.0, "schedule": "constant", "warmup": 0.0, "min_rate": 0.0, **options})
    return [learning_rate(step, steps, config) for step in range(1, steps + 1)]


def test_constant_with_warmup() -> None:
    assert rates(4) == [8, 8, 8, 8]
    assert rates(6, warmup=4.0) == [2, 4, 6, 8, 8, 8]  # a number of steps
    assert rates(8, warmup=0.5) == [2, 4, 6, 8, 8, 8, 8, 8]  # a share of them
    assert rates(3, warmup=1.0) == [8, 8, 8]  # one step: at once
    assert rates(3, warmup=5.0) == [8 / 5, 16 / 5, 24 / 5]  # longer than the run


def test_linear() -> None:
    assert rates(4, schedule="linear") == [8, 6, 4, 2]
    assert rates(6, schedule="linear", warmup=2.0) == [4, 8, 8, 6, 4, 2]
    assert rates(4, schedule="linear", min_rate=0.5) == [8, 7, 6, 5]


def test_cosine() -> None:
    assert rates(4, schedule="cosine") == pytest.approx([8, 4 + 4 * math.cos(math.pi / 4), 4, 4 - 4 * math.cos(math.pi / 4)])
    assert rates(6, schedule="cosine", warmup=2.0)[:3] == [4, 8, 8]
    assert rates(5, schedule="cosine", warmup=1.0, min_rate=0.25)[3] == pytest.approx(2 + 6 * 0.5)  # half way down


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 3.0])
def test_every_step_learns(schedule: str, warmup: float) -> None:
    for steps in (1, 2, 7, 100):
        found = rates(steps, schedule=schedule, warmup=warmup)
        assert all(0 < rate <= 8 for rate in found)


@pytest.mark.parametrize(
    ("each", "epochs", "most", "expected"),
    [(3, 1.0, None, 3), (3, 2.0, None, 6), (3, 0.5, None, 2), (3, 2.0, 5, 5), (3, 1.0, 9, 3), (1, 1.0, None, 1),
     (2, 1.5, None, 3), (3, 0.01, None, 1)],
)  # fmt: skip
def test_total_steps(each: int, epochs: float, most: int | None, expected: int) -> None:
    assert total_steps(each, SimpleNamespace(epochs=epochs, max_steps=most)) == expected
