"""The value model: a model with a head of one number, prepared and saved beside the policy.

Its values stand at the same places as the policy's log-probabilities: before each own token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from swift_core.errors import RequestError
from swift_core.types import Batch, Run, TunedModel

FOLDER = "value"  # within a checkpoint
POOLED = ("reward", "sequence_classification", "reranker", "embedding")  # tasks whose head reads a whole text


class Critic:
    """The role `value`, as a run's second trained model: its own optimizer, and a `Backend.prepare` of its own."""

    def __init__(self, run: Run, optimizer: Any, config: Any) -> None:
        """Raises RequestError for a model whose head gives another count of numbers, or one of another vocabulary."""
        tuned = run.models.get("value")
        if tuned.model is run.models.get("policy").model:
            raise RequestError("models.value: the value model must not be the policy's own")
        task = getattr(getattr(tuned, "bundle", None), "task", "")
        if task in POOLED:
            raise RequestError(
                f"models.value: its head for {task} says a number of a whole text, and a value model says one at each token; "
                "name a reward model that was tuned with tuner=full, or merge this one: swift-core export"
            )
        if run.resume_from:
            tuned.load(run.resume_from / FOLDER)
        for module in tuned.model.modules():  # values that differ by chance alone would be taken for advantages
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        self.tuned, self.steps = tuned, run.backend.prepare({"policy": tuned}, optimizer, config)
        if run.resume_from:
            self.steps.load(run.resume_from / FOLDER)

    def forward(self, batch: Batch) -> torch.Tensor:
        """The value before each own token of a batch, without a gradient: [N] float32."""
        return values_of(self.steps.forward("policy", batch))


def values_of(outputs: Any) -> torch.Tensor:
    """[N] float32. Raises RequestError for a head of several numbers."""
    found = outputs.trained_logits()
    if found.shape[-1] != 1:
        raise RequestError(f"models.value: its head gives {found.shape[-1]} numbers; a value model gives one: num_labels 1")
    values: torch.Tensor = found[:, 0].float()
    return values


class Both:
    """Policy and value model as one thing that is saved: the latter in a folder of its own within the checkpoint."""

    def __init__(self, policy: Any, value: TunedModel | Any) -> None:
        self.policy, self.value = policy, value

    def save(self, folder: Path) -> None:
        (folder / FOLDER).mkdir(exist_ok=True)
        self.policy.save(folder)
        self.value.save(folder / FOLDER)
