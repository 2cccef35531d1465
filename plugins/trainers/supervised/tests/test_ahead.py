"""Batches made ahead by a thread: in order, bounded, with the error where it came, and over when the loop ends."""

from __future__ import annotations

import threading
import time

import pytest
from swift_plugin_supervised.feed import ahead


@pytest.mark.parametrize("depth", [0, 1, 3, 99])
def test_the_order_is_that_of_the_items(depth: int) -> None:
    assert list(ahead(lambda n: n * n, range(20), depth)) == [n * n for n in range(20)]


def test_it_is_depth_items_ahead_and_no_more() -> None:
    begun: list[int] = []
    made = ahead(lambda n: begun.append(n) or n, range(100), 3)
    for n in range(5):
        assert next(made) == n
        end = time.monotonic() + 5
        while len(begun) < n + 4 and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(0.01)
        assert begun == list(range(n + 4))
    made.close()


def test_work_goes_on_while_the_taker_is_busy() -> None:
    ready = threading.Event()
    made = ahead(lambda n: ready.set() if n == 1 else None, range(2), 1)
    next(made)
    assert ready.wait(5)
    made.close()


def test_an_error_comes_where_its_item_is() -> None:
    def work(n: int) -> int:
        if n == 2:
            raise ValueError("two")
        return n

    made = ahead(work, range(9), 2)
    assert [next(made), next(made)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(made)


def test_its_thread_is_gone_when_it_is_closed() -> None:
    made = ahead(lambda n: n, range(1000), 2)
    next(made)
    assert any(thread.name.startswith("ahead") for thread in threading.enumerate())
    made.close()
    assert not any(thread.name.startswith("ahead") for thread in threading.enumerate())


def test_its_thread_tells_when_it_computes_no_more() -> None:
    told: list[str] = []

    def work(n: int) -> int:
        if n == 2:
            raise ValueError("bad")
        return n

    made = ahead(work, range(3), 2, lambda: told.append(threading.current_thread().name))
    assert [next(made), next(made)] == [0, 1]
    with pytest.raises(ValueError, match="bad"):
        next(made)
    assert len(told) == 3
    assert all(name.startswith("ahead") for name in told)
