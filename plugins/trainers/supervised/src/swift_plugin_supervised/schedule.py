"""Pure functions of the step: the learning rate, and how many steps there are.

Nothing here has state, so a resumed run asks again and gets the same answers.
"""

from __future__ import annotations

import math
from typing import Any


def learning_rate(step: int, steps: int, config: Any) -> float:
    """The rate of step `step` (1-based) of `steps`: linear warm-up, then cosine, linear or constant down to min_rate."""
    warmup = round(config.warmup * steps) if config.warmup < 1 else int(config.warmup)
    if step <= warmup:
        return float(config.learning_rate * step / warmup)
    progress = (step - 1 - warmup) / max(1, steps - warmup)
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[config.schedule]
    return float(config.learning_rate * (config.min_rate + (1 - config.min_rate) * left))


def total_steps(epoch_steps: int, config: Any) -> int:
    """Steps of the run, of which an epoch takes `epoch_steps`."""
    steps = math.ceil(config.epochs * epoch_steps)
    return max(1, min(steps, config.max_steps or steps))
