"""The pure functions of a step, by value."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from swift_plugin_supervised.schedule import learning_rate, rows_of_step, share_of_rank, steps_per_epoch, total_steps


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
    ("samples", "rows", "epochs", "most", "expected"),
    [(10, 4, 1.0, None, 3), (10, 4, 2.0, None, 6), (10, 4, 0.5, None, 2), (10, 4, 2.0, 5, 5), (10, 4, 1.0, 9, 3),
     (3, 8, 1.0, None, 1), (8, 4, 1.5, None, 3), (10, 4, 0.01, None, 1)],
)  # fmt: skip
def test_total_steps(samples: int, rows: int, epochs: float, most: int | None, expected: int) -> None:
    config = SimpleNamespace(epochs=epochs, max_steps=most)
    assert total_steps(samples, rows, config) == expected


def test_each_epoch_takes_each_row_once() -> None:
    for samples, rows in ((10, 4), (8, 4), (3, 8), (1, 1)):
        each = steps_per_epoch(samples, rows)
        orders = []
        for epoch in range(3):
            taken = [rows_of_step(epoch * each + step, samples, rows, 42, True) for step in range(1, each + 1)]
            assert {len(step) for step in taken[:-1]} <= {rows}
            assert 0 < len(taken[-1]) <= rows
            flat = [row for step in taken for row in step]
            assert Counter(flat) == Counter(range(samples))
            orders.append(flat)
        if samples > 3:
            assert orders[0] != orders[1] != orders[2]


def test_the_order_depends_on_seed_and_step_alone() -> None:
    first = rows_of_step(5, 10, 4, 1, True)
    rows_of_step(1, 99, 7, 3, True)
    assert rows_of_step(5, 10, 4, 1, True) == first
    assert [rows_of_step(step, 10, 4, 2, True) for step in (1, 2)] != [rows_of_step(step, 10, 4, 1, True) for step in (1, 2)]
    assert [rows_of_step(step, 10, 4, 1, False) for step in (1, 2, 3, 4)] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [0, 1, 2, 3],
    ]  # fmt: skip


def test_ranks_share_a_steps_rows() -> None:
    for count in range(12):
        rows = [100 + n for n in range(count)]
        for world in (1, 2, 3, 5):
            shares = [share_of_rank(rows, rank, world) for rank in range(world)]
            assert [row for share in shares for row in share] == rows
            sizes = [len(share) for share in shares]
            assert max(sizes) - min(sizes) <= 1
