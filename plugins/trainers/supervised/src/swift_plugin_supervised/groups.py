"""Samples that belong together in passes: each group whole, and its beginning computed once where the model allows.

A group is a pair of answers, or the answers to one prompt. Shapes: B rows, T tokens, N trained positions, S samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from swift_core.types import Batch, Sample, Template

Group = Sequence[Sample]


def group_batches(
    template: Template, groups: Sequence[Group], flat: bool, shares: bool, limit: int | None
) -> Iterator[tuple[Batch, list[int]]]:
    """Batches of groups in their order, with the indexes of the groups in each; the samples of a batch are numbered through, as
    `Batch.sample_of` has them.

    flat: lay samples end to end, as many groups as `limit` tokens hold; else all groups are padded in one batch. shares: each
    group holds what its samples begin with once.
    """
    for members in _passes(groups, limit if flat else None):
        chosen = [groups[n] for n in members]
        samples = [sample for group in chosen for sample in group]
        share = [len(group) for group in chosen] if shares else False
        packed = template.pack(samples, share) if flat else None
        yield template.collate([packed] if packed else samples), members


def _passes(groups: Sequence[Group], limit: int | None) -> Iterator[list[int]]:
    """Groups in parts of at most `limit` tokens. A larger one is alone."""
    found: list[int] = []
    tokens = 0
    for n, group in enumerate(groups):
        size = sum(len(sample.input_ids) for sample in group)
        if found and limit is not None and tokens + size > limit:
            yield found
            found, tokens = [], 0
        found.append(n)
        tokens += size
    if found:
        yield found


def sums(values: torch.Tensor, outputs: Any, batch: Batch, count: int) -> torch.Tensor:
    """Of values at the trained positions [N], the sum in each of `count` samples: [S]."""
    return values.new_zeros(count).index_add(0, owners(outputs, batch), values)


def owners(outputs: Any, batch: Batch) -> torch.Tensor:
    """The number of the sample that each trained position belongs to: [N]."""
    assert batch.sample_of is not None
    return batch.sample_of[:, 1:][outputs.trained]
