"""Pure functions of the step: the learning rate, how many steps there are, which rows a step takes.

Nothing here has state, so a resumed run asks again and gets the same answers.
"""

from __future__ import annotations

import math
import random
from typing import Any


def learning_rate(step: int, steps: int, config: Any) -> float:
    """The rate of step `step` (1-based) of `steps`: linear warm-up, then cosine, linear or constant down to min_rate."""
    warmup = round(config.warmup * steps) if config.warmup < 1 else int(config.warmup)
    if step <= warmup:
        return float(config.learning_rate * step / warmup)
    progress = (step - 1 - warmup) / max(1, steps - warmup)
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[config.schedule]
    return float(config.learning_rate * (config.min_rate + (1 - config.min_rate) * left))


def steps_per_epoch(samples: int, rows_a_step: int) -> int:
    return math.ceil(samples / rows_a_step)


def total_steps(samples: int, rows_a_step: int, config: Any) -> int:
    steps = math.ceil(config.epochs * steps_per_epoch(samples, rows_a_step))
    return max(1, min(steps, config.max_steps or steps))


def rows_of_step(step: int, samples: int, rows_a_step: int, seed: int, shuffle: bool) -> list[int]:
    """Indexes of the samples that step `step` (1-based) takes, all ranks together; fewer at the end of an epoch."""
    epoch, within = divmod(step - 1, steps_per_epoch(samples, rows_a_step))
    order = list(range(samples))
    if shuffle:
        random.Random(f"{seed}-{epoch}").shuffle(order)
    return order[within * rows_a_step : (within + 1) * rows_a_step]


def share_of_rank(rows: list[int], rank: int, world: int) -> list[int]:
    """A contiguous share for each rank, sizes differing by one at most."""
    return rows[rank * len(rows) // world : (rank + 1) * len(rows) // world]
