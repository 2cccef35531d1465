"""Figures of preference learning, summed over passes and ranks until they are reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from swift_core.types import LossFn

Counted = dict[str, tuple[float, int]]
"""A figure's name -> its sum, and how many it is the sum of."""


class Meter:
    """Means of figures over all that was added since the last `result`."""

    def __init__(self) -> None:
        self.found: Counted = {}

    def add(self, values: Mapping[str, torch.Tensor]) -> None:
        """Each figure of some pairs or answers, [any number]. One transfer from the device for all."""
        names = [name for name, value in values.items() if value.numel()]
        if not names:
            return
        for name, value in zip(
            names, torch.stack([values[name].detach().double().sum() for name in names]).tolist(), strict=True
        ):
            total, count = self.found.get(name, (0.0, 0))
            self.found[name] = total + value, count + values[name].numel()

    def result(self) -> dict[str, float]:
        """The means over all ranks; forgets what was added. Collective."""
        total: Counted = {}
        for found in everywhere(self.found):
            for name, (value, count) in found.items():
                before = total.get(name, (0.0, 0))
                total[name] = before[0] + value, before[1] + count
        self.found = {}
        means = {name: value / count for name, (value, count) in total.items()}
        if {"rewards_chosen", "rewards_rejected"} <= means.keys():
            means.setdefault("reward_margin", means["rewards_chosen"] - means["rewards_rejected"])
        return means


class Watch:
    """The meter of evaluations, as the loop uses it. loss: a loss function of (meter, outputs, batch)."""

    def __init__(self, loss: Callable[..., torch.Tensor]) -> None:
        self.loss, self.meter = loss, Meter()

    def watching(self, loss_fn: LossFn) -> LossFn:
        self.meter = Meter()
        return lambda outputs, batch: self.loss(self.meter, outputs, batch)

    def result(self) -> dict[str, float]:
        return self.meter.result()


def everywhere(value: Any) -> list[Any]:
    """What each rank has, in the order of ranks. Collective."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
