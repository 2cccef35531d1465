"""Samples to batches, padded or packed, for text models. Shapes: B samples, T tokens of the longest."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

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
    sample_of = torch.arange(len(samples))[:, None].expand(-1, length).masked_fill(mask == 0, -1)
    if packed:
        segments, shared = samples[0].segments, samples[0].shared or [0] * len(samples[0].segments)
        ends = torch.tensor([0, *segments]).cumsum(0)
        positions = [torch.arange(start, start + n) for start, n in zip(shared, segments, strict=True)]
        inputs = {"input_ids": ids, "position_ids": torch.cat(positions)[None], "cu_seq_lens_q": ends.int()}
        begins = [before == 0 and after > 0 for before, after in zip(shared, [*shared[1:], 0], strict=True)]
        if any(shared):
            inputs["cu_seq_lens_k"] = (ends + torch.tensor([0, *shared]).cumsum(0)).int()
            repeated = sum(shared) - sum(n for n, begin in zip(segments, begins, strict=True) if begin)
        numbers = iter(range(len(segments)))
        owners = [-1 if begin else next(numbers) for begin in begins]
        sample_of = torch.repeat_interleave(torch.tensor(owners), torch.tensor(segments))[None]
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
        sample_of=sample_of,
    )


def pack(samples: Sequence[Sample], share: bool | Sequence[int] = False) -> Sample:
    """Samples one after the other, as one sample with their lengths as segments. Where they have media, `media["samples"]`
    are the samples themselves. With `share`, the tokens that all begin with stand once, as the first segment; `[2, 3]`: those
    of the first two, then those of the next three."""
    sizes = [len(samples)] if isinstance(share, bool) else list(share)
    if sum(sizes) != len(samples):
        raise ValueError(f"share={sizes} counts {sum(sizes)} samples, and {len(samples)} are packed")
    packed = Sample([], [], samples[0].row, samples[0].where)
    for end, size in zip(accumulate(sizes), sizes, strict=True):
        group = samples[end - size : end]
        shared = common_beginning(group) if share else 0
        if shared:
            packed.input_ids += group[0].input_ids[:shared]
            packed.weights += [0.0] * shared
        for sample in group:
            packed.input_ids += sample.input_ids[shared:]
            packed.weights += sample.weights[shared:]
        packed.segments += [*([shared] if shared else []), *(len(sample.input_ids) - shared for sample in group)]
        packed.shared += [*([0] if shared else []), *[shared] * size]
    if not any(packed.shared):
        packed.shared = []
    if any(sample.media for sample in samples):
        packed.media = {"samples": list(samples)}
    return packed


def common_beginning(samples: Sequence[Sample]) -> int:
    """How many first tokens all samples have in common, none of them trained, with one more untrained in each: what follows
    the beginning is not predicted from it alone. 0 where that is too few to gain by, or where there are media."""
    if len(samples) < 2 or any(sample.media for sample in samples):
        return 0
    limit = min(next((n for n, weight in enumerate(s.weights) if weight), len(s.weights)) - 1 for s in samples)
    one, other = (choose(sample.input_ids[: max(0, limit)] for sample in samples) for choose in (min, max))
    count = next((n for n, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), len(one))
    return count if count >= WORTH else 0
