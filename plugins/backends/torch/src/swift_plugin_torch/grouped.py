"""Rows of models whose cache cannot be shared: generated together by the model's own `generate`, from beginning to end.

State-space and hybrid models, encoder-decoders, models with positions of their own, and prompts with media go this way. The
sampler is the same: a logits processor chooses each row's token, and leaves generate no other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from swift_plugin_torch.positions import own_positions
from swift_plugin_torch.rows import Row

NONE = 2**31 - 1  # a token that is never made: `Finished` knows what ends a row
LOSING = {"JanusForConditionalGeneration", "WhisperForConditionalGeneration"}
"""Whose own `generate` hands text to the library's without the logits processors, or makes its answer in pieces of its own."""


class Chooser(LogitsProcessor):  # type: ignore[misc]
    """Lets a function choose the rows' tokens, from the model's logits as they are."""

    def __init__(self, model: Any, choose: Callable[[torch.Tensor], Sequence[int | None]], pad: int) -> None:
        self._choose, self._pad = choose, pad
        self._logits: torch.Tensor | None = None
        self._hook = model.register_forward_hook(self._keep)

    def _keep(self, module: Any, args: Any, outputs: Any) -> None:
        self._logits = outputs.logits[:, -1]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raw = self._logits if self._logits is not None and self._logits.shape == scores.shape else scores
        # A token that the checkpoint's generation settings rule out, or force, is so here too.
        tokens = self._choose(torch.where(scores.isneginf(), scores, raw.to(scores.device, scores.dtype)))
        told = torch.full_like(scores, float("-inf"))
        chosen = [self._pad if token is None else token for token in tokens]
        told[torch.arange(len(chosen), device=scores.device), torch.tensor(chosen, device=scores.device)] = 0.0
        return told

    def close(self) -> None:
        self._hook.remove()


class Finished(StoppingCriteria):  # type: ignore[misc]
    """Ends each row when its own request says so."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        over = [row.finish is not None or row.call.cancelled for row in self.rows]
        return torch.tensor(over, device=input_ids.device)


def generate(
    model: Any,
    rows: Sequence[Row],
    inputs: Mapping[str, torch.Tensor],
    pad: int,
    choose: Callable[[torch.Tensor], Sequence[int | None]],
) -> None:
    """Generate all rows to their ends. inputs: what the model takes for their prompts; choose: [R, V] -> a token each, added
    to its row by the function itself."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    settings = GenerationConfig(
        max_new_tokens=max(row.request.max_tokens for row in rows), pad_token_id=pad, do_sample=False, repetition_penalty=1.0,
        eos_token_id=NONE,
    )  # fmt: skip
    chooser = Chooser(base, choose, pad)
    make = partial(GenerationMixin.generate, base) if type(base).__name__ in LOSING else model.generate
    try:
        make(
            **inputs, **own_positions(model, dict(inputs)), generation_config=settings,
            logits_processor=LogitsProcessorList([chooser]), stopping_criteria=StoppingCriteriaList([Finished(rows)]),
        )  # fmt: skip
    finally:
        chooser.close()
