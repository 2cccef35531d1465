"""Forward passes over whole sequences, laid end to end as a trainer lays them, else padded.

Where a model keeps sequences apart, which is tried once, a sequence is then computed by the same operations whatever else is in
its pass: the trainer and the engine give it the same log-probabilities, in half precisions too. Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from swift_core.types import Batch, Sample, Template

PROBE = 48  # tokens of a sequence that are tried
FAULTS = (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError)

Logits = Callable[[Batch], torch.Tensor]
"""A batch to logits [B, T, V]."""


class Scoring:
    """rows: sequences of a pass."""

    def __init__(self, template: Template, rows: int) -> None:
        self.template, self.rows = template, rows
        self._flat: int | None = None  # sequences of a flat pass; 0: they are padded. Found by the first call

    def passes(
        self, logits: Logits, samples: Sequence[Sample], lengths: Sequence[int]
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Of each of the samples, in any order: its number, logits [length, V], and the ids that they follow on [length]."""
        order = sorted(range(len(samples)), key=lengths.__getitem__)
        plain = not any(sample.media for sample in samples)  # what media do to positions and masks is not tried here
        if self._flat is None and order and plain:
            self._flat = self._tried(logits, samples[order[-1]])
        flat = self._flat or 0 if plain else 0
        for start in range(0, len(order), flat or self.rows):
            chosen = order[start : start + (flat or self.rows)]
            own = [samples[n] for n in chosen]
            packed = self.template.pack(own) if flat else None
            batch = self.template.collate([packed] if packed else own)
            found = logits(batch)
            at = 0
            for row, n in enumerate(chosen):
                place = (0, slice(at, at + lengths[n])) if packed else (row, slice(0, lengths[n]))
                at += lengths[n]
                yield n, found[place], batch.labels[place]

    def _tried(self, logits: Logits, longest: Sample) -> int:
        """Sequences of a flat pass: one where the model lets them see each other, none where it takes no flat row.

        The last of two sequences must get the same logits whatever the first one holds, to the last bits, and those it gets
        alone, to the precision that is computed in: a device may round a longer pass otherwise.
        """
        ids = list(longest.input_ids[:PROBE])
        begun = ([token % 251 + 3 for token in ids], ids)
        first, other, shown = (Sample(part, [1.0] * len(part)) for part in (*begun, ids[::-1]))
        try:
            packs = [self.template.pack(held) for held in ([shown], [first, shown], [other, shown])]
            if any(pack is None for pack in packs):
                return 0
            plain = logits(self.template.collate([shown]))[0].float()
            found = [logits(self.template.collate([pack]))[0, -len(ids) :] for pack in packs if pack]
        except FAULTS:
            return 0
        alone, both, changed = (scores.float() for scores in found)
        size, limit = float(plain.abs().max()), 1e-3 if found[0].dtype == torch.float32 else 0.05
        if float((alone - plain).abs().max()) > limit * size:
            return 0
        kept = float((both - changed).abs().max()) <= 1e-5 * size and float((both - alone).abs().max()) <= limit * size
        return self.rows if kept else 1
