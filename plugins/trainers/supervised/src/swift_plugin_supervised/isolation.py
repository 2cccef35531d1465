"""Whether a model keeps samples apart that are laid end to end in one row: found by trying, before training.

Attention layers can; state-space layers and models that ignore position ids cannot, and a model's name does not tell.
"""

from __future__ import annotations

from typing import Any

from swift_core.types import Sample, Samples, Template

PROBE = 48  # tokens of a sample that are tried


def isolates(steps: Any, template: Template, samples: Samples) -> str | None:
    """None where the model isolates, else the reason in a few words.

    The second of two samples must get the same logits whatever the first one holds, to the last bits, and those it gets
    alone, to the precision that is computed in.
    """
    if len(samples) < 2:
        return None
    longest = sorted(range(min(len(samples), 64)), key=lambda n: -samples.lengths[n])[:2]
    first, second = (_begin(samples[n]) for n in longest)
    other = [token % 251 + 3 for token in range(len(first.input_ids))]
    packs = [template.pack([_of(ids), second]) for ids in (first.input_ids, other)]
    if packs[0] is None or packs[1] is None:
        return "this template cannot isolate samples laid end to end"
    try:
        both, changed = (steps.forward("policy", template.collate([pack])).logits[0, len(other) :].float() for pack in packs)
        alone = steps.forward("policy", template.collate([second])).logits[0].float()
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as err:
        return f"this model does not take samples laid end to end ({type(err).__name__}: {' '.join(str(err).split())[:120]})"
    size = float(alone.abs().max())
    leak, shift = float((both - changed).abs().max()), float((both - alone).abs().max())
    if leak > 1e-5 * size or shift > 0.05 * size:
        return f"this model lets samples laid end to end see each other (logits differ by {max(leak, shift):.2g})"
    return None


def _begin(sample: Sample) -> Sample:
    return _of(list(sample.input_ids[:PROBE]))


def _of(ids: list[int]) -> Sample:
    return Sample(ids, [1.0] * len(ids))
