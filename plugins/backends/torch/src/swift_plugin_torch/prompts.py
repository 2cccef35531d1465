"""What a model's generate takes for a batch of requests: padded ids, and the tensors of their media, made when they are needed.

Shapes: B requests, T tokens of the longest prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from swift_core.errors import CapabilityError
from swift_core.types import Request, Template


def kinds(request: Request) -> tuple[tuple[str, int], ...]:
    """The kinds of a request's media, and how many of each: what requests of one batch share."""
    return tuple((key, len(items)) for key, items in sorted(request.media.items()) if items)


def text_ids(template: Template, request: Request) -> list[int]:
    """The ids of a request's prompt, the places of its media not yet filled. Raises ValueError, and CapabilityError for media
    that the model does not take."""
    if getattr(template, "media", None) is None and kinds(request):
        names = ", ".join(key for key, _ in kinds(request))
        raise CapabilityError(f"the request has {names}, and this model takes text only")
    if request.token_ids is not None:
        return list(request.token_ids)
    return template.prompt(request.messages or [], request.tools, **request.template_kwargs)


def media_inputs(template: Any, request: Request) -> dict[str, torch.Tensor] | None:
    """input_ids and attention_mask [1, T] of a prompt with media, and their tensors; None where the model takes text only.
    Raises ValueError for media that cannot be read or that the model does not take."""
    if getattr(template, "media", None) is None:
        return None
    if request.token_ids is not None:
        if kinds(request):
            raise CapabilityError("media go with messages, whose places they fill, not with token ids")
        return _of_ids([request.token_ids], 0)
    return dict(template.inputs(request.messages or [], request.media, request.tools, **request.template_kwargs))


def gathered(
    template: Any, made: Sequence[Mapping[str, torch.Tensor] | None], prompts: Sequence[Sequence[int]], pad: int, encoded: bool
) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask [B, T] of several prompts, padded on the left, or where they are `encoded` by a part of
    their own on the right, and media tensors."""
    if any(inputs is None for inputs in made):
        return _of_ids(prompts, pad, encoded)
    return dict(template.batch(made))


def _of_ids(prompts: Sequence[Sequence[int]], pad: int, right: bool = False) -> dict[str, torch.Tensor]:
    width = max(len(prompt) for prompt in prompts)

    def padded(own: list[int], filler: int) -> list[int]:
        more = [filler] * (width - len(own))
        return own + more if right else more + own

    ids = torch.tensor([padded(list(prompt), pad) for prompt in prompts])
    mask = torch.tensor([padded([1] * len(prompt), 0) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def placed(inputs: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors where the model is, those of numbers with a fraction in its precision."""
    return {key: value.to(device, dtype if value.is_floating_point() else None) for key, value in inputs.items()}
