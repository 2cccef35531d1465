"""The trainer kto: single answers that are labelled good or bad.

KTO's point of reference is an estimate of KL(policy || reference), from prompts with the answers to other prompts: here over
the answers of the whole step, or of the whole evaluation, so that passes and processes change nothing. Shapes: N answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from swift_core.errors import RequestError, RunError
from swift_core.types import Batch, Run, Sample, Samples
from swift_plugin_supervised.feed import share_of_rank
from swift_plugin_supervised.groups import group_batches
from swift_plugin_supervised.loop import Progress

from swift_plugin_preference import losses
from swift_plugin_preference.forms import first_trained
from swift_plugin_preference.logps import answers
from swift_plugin_preference.meter import Meter, everywhere
from swift_plugin_preference.trainer import PreferenceTrainer


class AnswerTrainer(PreferenceTrainer):
    """Trainer `kto`."""

    def __init__(self, run: Run) -> None:
        self.evaluated_kl: float | None = None  # while evaluating
        super().__init__(run)

    def _begin(self, steps: Any, state: Progress) -> None:
        super()._begin(steps, state)
        config = self.config
        one = config.batch_tokens is None and config.batch_size * config.accumulate * self.run.backend.world == 1
        if one and config.loss == "kto":
            raise RequestError(
                "trainer.kto: a step has one answer, and the estimate of KL needs the prompt of another: set batch_size or "
                "accumulate to 2 or more, or loss to apo_zero_unpaired"
            )

    def fits(self, sample: Sample) -> bool:
        return isinstance(sample.label, dict) and "good" in sample.label

    def loss(self, meter: Meter, outputs: Any, batch: Batch) -> torch.Tensor:
        config, logps = self.config, answers(outputs, batch, int(batch.weight))
        good = torch.tensor(batch.targets["good"], device=logps.device)
        kl = torch.tensor(batch.targets["kl"], device=logps.device)
        ratio = logps - batch.targets["reference"]
        found = losses.KTO[config.loss](ratio, good, kl, config.beta)
        rewards = config.beta * ratio.detach()
        meter.add({
            "rewards_chosen": rewards[good], "rewards_rejected": rewards[~good], "logps_chosen": logps[good],
            "logps_rejected": logps[~good], "reward_accuracy": ((ratio > kl) == good).float(),
            **({"kl": kl[None]} if config.loss == "kto" else {}),
        })  # fmt: skip
        return (found * torch.where(good, config.desirable, config.undesirable)).sum()

    def targets(self, batch: Batch, groups: Sequence[Sequence[Sample]]) -> dict[str, Any]:
        samples = [sample for group in groups for sample in group]
        return {"good": [sample.label["good"] for sample in samples], "samples": samples}

    # --- the estimate of KL -------------------------------------------------------------------------------------------

    def _ready(self, steps: Any, batches: list[Batch]) -> None:
        super()._ready(steps, batches)
        kl = 0.0
        if self.config.loss == "kto":
            kl = self._step_kl(steps, batches) if self.evaluated_kl is None else self.evaluated_kl
        for batch in batches:
            batch.targets["kl"] = kl

    def _step_kl(self, steps: Any, batches: Sequence[Batch]) -> float:
        """Each answer of the step moves on to the next prompt, the last one of a rank to the first of the next. Collective."""
        samples = [sample for batch in batches for sample in batch.targets["samples"]]
        last = everywhere(samples[-1] if samples else None)
        rank = self.run.backend.rank
        order = [*range(rank - 1, -1, -1), *range(len(last) - 1, rank - 1, -1)]  # the ranks before this one, nearest first
        source = next((n for n in order if last[n] is not None), None)
        alone = len(samples) == 1 and source == rank  # there is no other prompt: no estimate
        pairs = zip(samples, [last[source], *samples[:-1]], strict=True) if source is not None and samples and not alone else ()
        return self._kl(steps, (self.moved(prompt, other) for prompt, other in pairs))

    def _evaluate(self, steps: Any, state: Progress, held: Samples) -> None:
        if self.config.loss == "kto":
            mine = share_of_rank(range(len(held)), self.run.backend.rank, self.run.backend.world) if len(held) > 1 else []
            self.evaluated_kl = self._kl(steps, (self.moved(held[n], held[n - 1 if n else len(held) - 1]) for n in mine))
        try:
            super()._evaluate(steps, state, held)
        finally:
            self.evaluated_kl = None

    def _kl(self, steps: Any, samples: Iterator[Sample]) -> float:
        """max(0, mean of log policy - log reference) over all ranks' samples (KTO, section 4.2). Collective."""
        total, count = 0.0, 0
        while chunk := [sample for _, sample in zip(range(self.config.batch_size), samples, strict=False)]:
            for batch, members in self._joined(chunk):
                found = [answers(steps.forward(role, batch), batch, len(members)) for role in ("policy", "reference")]
                total += float((found[0] - found[1]).sum())
                count += len(members)
        sums = [sum(values) for values in zip(*everywhere((total, count)), strict=True)]
        return max(0.0, sums[0] / sums[1]) if sums[1] else 0.0

    def _joined(self, samples: list[Sample]) -> Iterator[tuple[Batch, list[int]]]:
        limit = getattr(self.run.backend, "pass_tokens", None)
        try:
            yield from group_batches(self.run.template, [[sample] for sample in samples], self.flat, False, limit)
        except RunError as err:
            raise RequestError(
                f"trainer.kto: a prompt with media and the answer to another one do not join ({err}); trainer.loss="
                "apo_zero_unpaired needs no such estimate"
            ) from err

    def moved(self, prompt: Sample, other: Sample) -> Sample:
        """A prompt with the answer to another one, cut where it is longer than a sample may be."""
        end, start = first_trained(prompt), first_trained(other)
        limit = None if prompt.media else self.config.max_length
        ids = [*prompt.input_ids[:end], *other.input_ids[start:]][:limit]
        weights = [*[0.0] * end, *other.weights[start:]][:limit]
        text = prompt.label.get("asks", "") + other.label.get("says", "")
        return replace(prompt, input_ids=ids, weights=weights, text=text)
