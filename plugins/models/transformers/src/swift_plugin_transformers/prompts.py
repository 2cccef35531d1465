"""Prompts with media put together to one batch for generation: padded on the left, so that all end where answers begin; on the
right for an encoder, whose decoder begins anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from swift_plugin_transformers.tensors import Layout, Place, join

TEXT = ("input_ids", "attention_mask")


def padded_prompts(
    prompts: Sequence[Mapping[str, torch.Tensor]], pad_id: int, extras: Sequence[str], layout: Layout,
    right: bool = False,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """What generate takes for several prompts, each as `ChatTemplate.inputs` gives it.

    prompts: input_ids and attention_mask [1, T] and the tensors of their media. extras, layout: see `tensors.join`.
    """
    if len(prompts) == 1:
        return dict(prompts[0])
    lengths = [prompt["input_ids"].shape[1] for prompt in prompts]
    size = len(prompts), max(lengths)
    ids = torch.full(size, pad_id, dtype=torch.long)
    mask = torch.zeros(size, dtype=torch.long)
    places: list[Place] = []
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        first = 0 if right else size[1] - length
        own = slice(first, first + length)
        ids[row, own], mask[row, own] = prompt["input_ids"][0], prompt["attention_mask"][0]
        places.append((row, first, length))
    media = [{key: value for key, value in prompt.items() if key not in TEXT} for prompt in prompts]
    joined = join(media, places, size, extras, layout) if any(media) else {}
    return {"input_ids": ids, "attention_mask": mask, **joined}
