"""Which samples a step takes, by value: order, packs, passes by tokens, ranks, streams."""

from __future__ import annotations

import random
from array import array
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from swift_core.errors import RequestError
from swift_core.source import SampleList
from swift_core.types import Sample
from swift_plugin_supervised.feed import Feed, best_fit, by_tokens, cut, share_of_rank


def samples(lengths: list[int], first: int = 0) -> SampleList:
    return SampleList(Sample([1] * length, [1.0] * length, row=first + n) for n, length in enumerate(lengths))


def feed(data: Any, flat: bool = True, world: int = 1, seed: int = 42, **options: Any) -> Feed:
    defaults = {"batch_size": 4, "batch_tokens": None, "accumulate": 1, "packing": False, "max_length": 64, "shuffle": True}
    return Feed(data, SimpleNamespace(**{**defaults, **options}), flat, world, seed)


def rows(passes: list[list[Sample]]) -> list[list[int]]:
    return [[sample.row for sample in one] for one in passes]


def test_each_epoch_takes_each_row_once() -> None:
    for count, size in ((10, 4), (8, 4), (3, 8), (1, 1)):
        made = feed(samples([5] * count), batch_size=size)
        each, orders = made.epoch_steps, []
        assert each == -(-count // size)
        for epoch in range(3):
            taken = [rows(made.passes(epoch * each + step, 0)) for step in range(1, each + 1)]
            assert all(len(step) == 1 for step in taken)
            assert {len(step[0]) for step in taken[:-1]} <= {size}
            flat = [row for step in taken for row in step[0]]
            assert Counter(flat) == Counter(range(count))
            orders.append(flat)
        if count > 3:
            assert orders[0] != orders[1] != orders[2]


def test_the_order_depends_on_seed_and_step_alone() -> None:
    data = samples([5] * 10)
    made = feed(data, seed=1)
    first = rows(made.passes(5, 0))
    made.passes(1, 0)
    assert rows(feed(data, seed=1).passes(5, 0)) == rows(made.passes(5, 0)) == first
    assert [rows(feed(data, seed=2).passes(step, 0)) for step in (1, 2)] != [rows(made.passes(step, 0)) for step in (1, 2)]
    plain = feed(data, shuffle=False)
    assert [rows(plain.passes(step, 0)) for step in (1, 2, 3, 4)] == [
        [[0, 1, 2, 3]], [[4, 5, 6, 7]], [[8, 9]], [[0, 1, 2, 3]],
    ]  # fmt: skip


def test_passes_and_ranks_share_a_steps_rows() -> None:
    data = samples([5] * 10)
    assert rows(feed(data, batch_size=2, accumulate=2, shuffle=False).passes(1, 0)) == [[0, 1], [2, 3]]
    shares = [rows(feed(data, batch_size=2, accumulate=2, world=2, shuffle=False).passes(1, rank)) for rank in (0, 1)]
    assert shares == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    last = [rows(feed(data, batch_size=2, accumulate=2, world=2, shuffle=False).passes(2, rank)) for rank in (0, 1)]
    assert last == [[[8]], [[9]]]
    for count in range(12):
        for world in (1, 2, 3, 5):
            parts = [list(share_of_rank(range(count), rank, world)) for rank in range(world)]
            assert [row for part in parts for row in part] == list(range(count))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_best_fit_by_hand() -> None:
    # 7 opens a pack (3 left), 6 another (4 left); 4 fits the second exactly, 3 the first; 2 and 2 share a third.
    assert list(best_fit([2, 7, 4, 6, 3, 2], 10)) == [[1, 4], [3, 2], [0, 5]]
    # First fit would put 3 beside 6 (4 left) or 5 (5 left), whichever is first; best fit takes the tighter place.
    assert list(best_fit([5, 3, 6, 5], 10)) == [[2, 1], [0, 3]]
    assert list(best_fit([12, 10, 1], 10)) == [[0], [1], [2]]
    assert list(best_fit([], 10)) == []


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_against_a_plain_search(seed: int) -> None:
    generator = random.Random(seed)
    lengths = array("I", [generator.randint(1, 100) for _ in range(300)])
    expected: list[list[int]] = []
    for n in sorted(range(300), key=lambda n: -lengths[n]):
        left = [100 - sum(lengths[m] for m in pack) for pack in expected]
        fitting = [(room, place) for place, room in enumerate(left) if room >= lengths[n]]
        if fitting:
            expected[min(fitting)[1]].append(n)
        else:
            expected.append([n])
    packs = list(best_fit(lengths, 100))
    assert sorted(n for pack in packs for n in pack) == list(range(300))
    assert all(sum(lengths[n] for n in pack) <= 100 for pack in packs)
    # Which of two packs with as much room is taken may differ; how full the packs are may not.
    assert sorted(sum(lengths[n] for n in pack) for pack in packs) == sorted(sum(lengths[n] for n in p) for p in expected)


def test_cut_by_hand() -> None:
    data = samples([4, 3, 3, 9, 1, 12, 2])
    assert [[sample.row for sample in part] for part in cut(data, 10)] == [[0, 1, 2], [3, 4], [5], [6]]
    assert cut(data, None) == [data]
    assert cut(samples([]), 10) == []


def test_packing_makes_rows_of_packs() -> None:
    made = feed(samples([2, 7, 4, 6, 3, 2]), packing=True, max_length=10, batch_size=2, shuffle=False)
    assert made.epoch_steps == 2
    assert [rows(made.passes(step, 0)) for step in (1, 2)] == [[[1, 4, 3, 2]], [[0, 5]]]


def test_passes_by_tokens() -> None:
    order, sizes = [0, 1, 2, 3, 4], [10, 3, 9, 4, 30]
    assert list(by_tokens(order, sizes, 20, padded=True)) == [[1, 3], [2, 0], [4]]  # 3 x 9 padded is too much
    assert list(by_tokens(order, sizes, 20, padded=False)) == [[1, 3, 2], [0], [4]]
    assert list(by_tokens(order, sizes, 20, padded=False, bucket=2)) == [[1, 0], [3, 2], [4]]
    made = feed(samples([7] * 40 + [20] * 40), batch_tokens=41, flat=False)
    shapes = [
        [len(sample.input_ids) for sample in one] for step in range(1, made.epoch_steps + 1) for one in made.passes(step, 0)
    ]
    assert all(max(shape) * len(shape) <= 41 for shape in shapes)
    assert sorted(map(tuple, shapes)) == [(7,) * 5] * 8 + [(20,) * 2] * 20
    assert shapes[:8] != [[7] * 5] * 8  # short and long ones mixed over the epoch


class Windows:
    """A stream of 25 records in windows of 10, with 2 samples for each record but none for record 12."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def window(self, position: int) -> tuple[SampleList, int]:
        self.asked.append(position)
        end = min(25, position + 10)
        found = SampleList(Sample([1, 2], [1.0, 1.0], row=n) for n in range(position, end) if n != 12 for _ in range(2))
        return found, 0 if end == 25 else end

    def close(self) -> None: ...


def test_a_stream_is_read_window_by_window_and_begins_again() -> None:
    data = Windows()
    made = feed(data, batch_size=8)
    taken = [sorted(row for one in rows(made.passes(step, 0)) for row in one) for step in range(1, 9)]
    assert [len(step) for step in taken] == [8, 8, 4, 8, 8, 2, 8, 2]
    assert data.asked == [0, 10, 20]
    assert Counter(row for step in taken for row in step) == Counter({n: 2 for n in range(25) if n != 12})
    again = rows(made.passes(9, 0))
    assert (made.position, made.first) == (0, 8)
    assert {row for one in again for row in one} <= set(range(10))
    # Resumed in the middle of the second window: the same rows.
    resumed, whole = feed(Windows(), batch_size=8), feed(Windows(), batch_size=8)
    steps = {step: rows(whole.passes(step, 0)) for step in range(1, 12)}
    resumed.seek(10, 3)
    assert {step: rows(resumed.passes(step, 0)) for step in range(5, 12)} == {step: steps[step] for step in range(5, 12)}


def test_a_stream_without_samples_is_told() -> None:
    empty = SimpleNamespace(window=lambda position: (SampleList(), 0))
    with pytest.raises(RequestError, match=r"^dataset: no row of the stream can be trained on"):
        feed(empty).passes(1, 0)
