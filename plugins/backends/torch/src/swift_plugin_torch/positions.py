"""Position ids that a model counts its own way, where the library's generation would count them from 0.

RoBERTa and its relatives number tokens from the padding token's id + 1. A plain forward pass does so; `generate` passes
position ids of its own, and so starts from tokens that training never put there.
"""

from __future__ import annotations

from typing import Any

import torch


def own_positions(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`position_ids` [B, T] as the model's embeddings make them from input_ids [B, T]; nothing for most models."""
    if "input_ids" not in inputs:  # an encoder that reads pictures or sound alone
        return {}
    for module in model.modules():
        make = getattr(module, "create_position_ids_from_input_ids", None)
        if make is not None and getattr(module, "padding_idx", None) is not None:
            return {"position_ids": make(inputs["input_ids"], module.padding_idx)}
    return {}
