"""Whether a model keeps samples apart that are laid end to end in one row: found by trying, before training.

Attention layers can; state-space layers and models that ignore position ids cannot, and a model's name does not tell.
"""

from __future__ import annotations

from typing import Any

import torch
from swift_core.parts import parts
from swift_core.types import Sample, Samples, Template

PROBE = 48  # tokens of a sample that are tried
FAULTS = (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError)


def isolates(steps: Any, template: Template, samples: Samples) -> str | None:
    """None where the model isolates, else the reason in a few words.

    The second of two samples must get the same logits whatever the first one holds, to the last bits, and those it gets
    alone, to the precision that is computed in.
    """
    if len(samples) < 2:
        return None
    shown = _with_media(samples)
    if shown is None:
        longest = sorted(range(min(len(samples), 64)), key=lambda n: -samples.lengths[n])[:2]
        first, second = (_begin(parts(samples[n])[0]) for n in longest)
        other = [token % 251 + 3 for token in range(len(first.input_ids))]
    else:
        try:
            if _own_positions(steps, template, shown):
                return "this model counts positions of media its own way"
        except FAULTS as err:
            return _refuses(err)
        first, second = _of(_answer(shown)), shown
        other = first.input_ids[1:] + first.input_ids[:1]
    packs = [template.pack([_of(ids), second]) for ids in (first.input_ids, other)]
    if packs[0] is None or packs[1] is None:
        return "this template cannot isolate samples laid end to end"
    try:
        both, changed = (steps.forward("policy", template.collate([pack])).logits[0, len(other) :].float() for pack in packs)
        plain = steps.forward("policy", template.collate([second])).logits[0]
    except FAULTS as err:
        return _refuses(err)
    alone = plain.float()
    # A mask that is not kept, of a picture's tokens or of a model's own making, may change little.
    limit = 1e-3 if plain.dtype == torch.float32 else 0.05
    size = float(alone.abs().max())
    leak, shift = float((both - changed).abs().max()), float((both - alone).abs().max())
    if leak > 1e-5 * size or shift > limit * size:
        what = "lets samples laid end to end see each other"
        if shown is not None and leak <= 1e-5 * size:
            what = "reads samples with media otherwise when they are laid end to end"
        return f"this model {what} (logits differ by {max(leak, shift):.2g})"
    return None


def shares(steps: Any, template: Template, samples: Samples) -> bool:
    """Whether samples laid end to end may hold the tokens that all begin with once: tried like `isolates`, which holds."""
    if len(samples) < 2:
        return False
    longest = max(range(min(len(samples), 64)), key=samples.lengths.__getitem__)
    ids = list(parts(samples[longest])[0].input_ids[: 2 * PROBE])
    if len(ids) < 16:
        return False
    half = len(ids) // 2
    weights = [0.0] * (half + 1) + [1.0] * (len(ids) - half - 1)
    other = [*ids[:half], *(token % 251 + 3 for token in reversed(ids[half:]))]
    try:
        pack = template.pack([Sample(other, weights), Sample(ids, weights)], share=True)
        if pack is None or not pack.shared:
            return False
        own = len(ids) - pack.shared[-1]
        found = steps.forward("policy", template.collate([pack])).logits[0, -own:].float()
        alone = steps.forward("policy", template.collate([Sample(ids, weights)])).logits[0, -own:].float()
    except FAULTS:
        return False
    return float((found - alone).abs().max()) <= 0.05 * float(alone.abs().max())


def _with_media(samples: Samples) -> Sample | None:
    """A sample with media, whole: it cannot be cut."""
    find = getattr(samples, "first_media", None)
    place = find() if find else next((n for n in range(len(samples)) if samples[n].media), None)
    return None if place is None else parts(samples[place])[0]


def _answer(sample: Sample) -> list[int]:
    """Trained tokens of a sample: none of them stands for media."""
    trained = [token for token, weight in zip(sample.input_ids, sample.weights, strict=True) if weight]
    return trained[:PROBE]


def _own_positions(steps: Any, template: Template, sample: Sample) -> bool:
    """Whether a model gives the tokens of a picture other positions than 0, 1, 2, ..., as those with a grid do."""
    batch = template.collate([sample])
    left = steps.forward("policy", batch).logits[0].float()
    batch.inputs["position_ids"] = torch.arange(len(sample.input_ids))[None]
    told = steps.forward("policy", batch).logits[0].float()
    return float((left - told).abs().max()) > 1e-3 * float(left.abs().max())


def _refuses(err: Exception) -> str:
    return f"this model does not take samples laid end to end ({type(err).__name__}: {' '.join(str(err).split())[:120]})"


def _begin(sample: Sample) -> Sample:
    return _of(list(sample.input_ids[:PROBE]))


def _of(ids: list[int]) -> Sample:
    return Sample(ids, [1.0] * len(ids))
