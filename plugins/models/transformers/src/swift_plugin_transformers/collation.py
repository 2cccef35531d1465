"""Samples to batches, padded or packed, for text models. Shapes: B samples, T tokens of the longest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from swift_core.types import Batch, Sample


def collate(samples: Sequence[Sample], pad_id: int) -> Batch:
    """Pad on the right. A packed sample must come alone: its position ids restart at each segment, and `cu_seq_lens_q` says
    where the segments end; there is no attention mask and no padding."""
    packed = any(sample.segments for sample in samples)
    if packed and len(samples) > 1:
        raise ValueError("a packed sample is a batch of its own")
    length = max(len(sample.input_ids) for sample in samples)
    ids = torch.full((len(samples), length), pad_id, dtype=torch.long)
    weights = torch.zeros((len(samples), length), dtype=torch.float32)
    mask = torch.zeros((len(samples), length), dtype=torch.long)
    for row, sample in enumerate(samples):
        count = len(sample.input_ids)
        ids[row, :count] = torch.tensor(sample.input_ids)
        weights[row, :count] = torch.tensor(sample.weights)
        mask[row, :count] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    first = [0]
    if packed:
        segments = samples[0].segments
        ends = torch.tensor([0, *segments]).cumsum(0)
        inputs = {"input_ids": ids, "position_ids": torch.cat([torch.arange(n) for n in segments])[None]}
        inputs["cu_seq_lens_q"] = ends.int()
        first = ends[:-1].tolist()
    weights[:, first] = 0  # nothing before it predicts a first token
    return Batch(
        inputs,
        ids,
        weights,
        [sample.row for sample in samples],
        float(weights.sum()),
        int(mask.sum()),
        int((weights > 0).sum()),
    )


def pack(samples: Sequence[Sample]) -> Sample:
    """Samples one after the other, as one sample with their lengths as segments."""
    return Sample(
        input_ids=[token for sample in samples for token in sample.input_ids],
        weights=[weight for sample in samples for weight in sample.weights],
        row=samples[0].row,
        where=samples[0].where,
        segments=[len(sample.input_ids) for sample in samples],
    )
