"""What a model's generate takes for a batch of requests: padded ids, and the tensors of their media, made when they are needed.

Shapes: B requests, T tokens of the longest prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from swift_core.errors import CapabilityError
from swift_core.types import Request, Template

APART = ("messages", "tools", "token_ids", "template_kwargs", "media")  # what requests of one batch may differ in


def settings(request: Request) -> tuple[Any, ...]:
    """What requests must share to be generated together: everything but their prompts, and the kinds and numbers of media."""
    shared = tuple(str(getattr(request, item.name)) for item in fields(request) if item.name not in APART)
    return *shared, *((key, len(items)) for key, items in sorted(request.media.items()) if items)


def text_ids(template: Template, request: Request) -> list[int]:
    """The ids of a request's prompt, the places of its media not yet filled: enough to order requests by. Raises ValueError."""
    if request.token_ids is not None:
        return list(request.token_ids)
    return template.prompt(request.messages or [], request.tools, **request.template_kwargs)


def make_inputs(
    template: Any, requests: Sequence[Request], prompts: Sequence[Sequence[int]], pad: int
) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask [B, T], padded on the left, and media tensors. Raises ValueError for media that cannot be
    read or that the model does not take."""
    if getattr(template, "media", None) is None:
        for request in requests:
            if any(request.media.values()):
                names = ", ".join(key for key, items in request.media.items() if items)
                raise CapabilityError(f"the request has {names}, and this model takes text only")
        return _of_ids(prompts, pad)
    made = [_one(template, request, prompt) for request, prompt in zip(requests, prompts, strict=True)]
    found: dict[str, torch.Tensor] = template.batch(made)
    return found


def _one(template: Any, request: Request, prompt: Sequence[int]) -> Mapping[str, torch.Tensor]:
    if request.token_ids is not None:
        return _of_ids([prompt], 0)
    found: Mapping[str, torch.Tensor] = template.inputs(
        request.messages or [], request.media, request.tools, **request.template_kwargs
    )
    return found


def _of_ids(prompts: Sequence[Sequence[int]], pad: int) -> dict[str, torch.Tensor]:
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def placed(inputs: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors where the model is, those of numbers with a fraction in its precision."""
    return {key: value.to(device, dtype if value.is_floating_point() else None) for key, value in inputs.items()}
