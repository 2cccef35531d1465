"""Samples to batches, padded or packed, for text models. Shapes: B samples, T tokens of the longest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from swift_core.types import Batch, Sample

WORTH = 8  # tokens of a shared beginning from which on it is computed once


def collate(samples: Sequence[Sample], pad_id: int) -> Batch:
    """Pad on the right. A packed sample must come alone: its position ids restart at each segment, and `cu_seq_lens_q` says
    where the segments end; there is no attention mask and no padding. Where the segments share their beginning, the positions
    of each go on from it, and `cu_seq_lens_k` counts it with each."""
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
    first, repeated = [0], 0
    if packed:
        segments, shared = samples[0].segments, samples[0].shared
        ends = torch.tensor([0, *segments]).cumsum(0)
        starts = [0, *[shared] * (len(segments) - 1)]
        positions = [torch.arange(start, start + n) for start, n in zip(starts, segments, strict=True)]
        inputs = {"input_ids": ids, "position_ids": torch.cat(positions)[None], "cu_seq_lens_q": ends.int()}
        if shared:
            inputs["cu_seq_lens_k"] = (ends + torch.tensor([0, *starts]).cumsum(0)).int()
            repeated = shared * (len(segments) - 2)
        first = ends[:-1].tolist()
    weights[:, first] = 0  # nothing before it predicts a first token
    return Batch(
        inputs,
        ids,
        weights,
        [sample.row for sample in samples],
        float(weights.sum()),
        int(mask.sum()) + repeated,
        int((weights > 0).sum()),
    )


def pack(samples: Sequence[Sample], share: bool = False) -> Sample:
    """Samples one after the other, as one sample with their lengths as segments. Where they have media, `media["samples"]`
    are the samples themselves. With `share`, the tokens that all begin with stand once, as the first segment."""
    shared = common_beginning(samples) if share else 0
    return Sample(
        input_ids=[*samples[0].input_ids[:shared], *(token for s in samples for token in s.input_ids[shared:])],
        weights=[*[0.0] * shared, *(weight for s in samples for weight in s.weights[shared:])],
        row=samples[0].row,
        where=samples[0].where,
        segments=[*([shared] if shared else []), *(len(sample.input_ids) - shared for sample in samples)],
        shared=shared,
        media={"samples": list(samples)} if any(sample.media for sample in samples) else {},
    )


def common_beginning(samples: Sequence[Sample]) -> int:
    """How many first tokens all samples have in common, none of them trained, with one more untrained in each: what follows
    the beginning is not predicted from it alone. 0 where that is too few to gain by, or where there are media."""
    if len(samples) < 2 or any(sample.media for sample in samples):
        return 0
    limit = min(next((n for n, weight in enumerate(s.weights) if weight), len(s.weights)) - 1 for s in samples)
    one, other = (choose(sample.input_ids[: max(0, limit)] for sample in samples) for choose in (min, max))
    count = next((n for n, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), len(one))
    return count if count >= WORTH else 0
