"""The trainers of pairs: dpo, orpo, cpo and simpo.

A batch's samples are pairs, the chosen one before the rejected one. Shapes: P pairs, S = 2 P samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from swift_core.errors import RequestError
from swift_core.parts import parts
from swift_core.types import Batch, Run, Sample, Samples
from swift_plugin_supervised.loop import Progress

from swift_plugin_preference import losses
from swift_plugin_preference.logps import answers, imitate_prompts, imitation, weight_of
from swift_plugin_preference.losses import Options, Pairs
from swift_plugin_preference.meter import Meter, everywhere
from swift_plugin_preference.trainer import PreferenceTrainer


class PairTrainer(PreferenceTrainer):
    """Trainers `dpo`, `orpo`, `cpo` and `simpo`."""

    size = 2

    def __init__(self, trainer_id: str, run: Run) -> None:
        config = run.trainer_config
        self.trainer_id, self.evaluating = trainer_id, False
        named = {name: getattr(config, name) for name in Options.__dataclass_fields__ if hasattr(config, name)}
        self.options = Options(**named)
        self.refers = trainer_id == "dpo" and not config.reference_free
        self.coupled = trainer_id == "dpo" and not config.losses.keys().isdisjoint({"aot", "aot_unpaired"})
        self.ld_alpha = config.ld_alpha if trainer_id == "dpo" else None
        self.whole = trainer_id == "orpo" and config.nll == "all"  # the prompt is imitated too
        super().__init__(run)

    def losses(self, pairs: Pairs) -> torch.Tensor:
        """The loss of each pair: [P]."""
        config = self.config
        if self.trainer_id == "dpo":
            return losses.mixture(pairs, config.losses, self.options, config.rpo_alpha)
        if self.trainer_id == "orpo":
            return losses.sft(pairs, self.options) + losses.odds_ratio(pairs, self.options)
        found = losses.CPO[config.loss](pairs, self.options)
        return found if config.cpo_alpha == 0 else found + config.cpo_alpha * losses.sft(pairs, self.options)

    def loss(self, meter: Meter, outputs: Any, batch: Batch) -> torch.Tensor:
        pairs = self.pairs(outputs, batch)
        found = self.losses(pairs)
        meter.add(self.figures(pairs))
        return found.sum()

    def pairs(self, outputs: Any, batch: Batch) -> Pairs:
        count, targets = 2 * int(batch.weight), batch.targets
        logprobs = outputs.logprobs()
        logps = answers(outputs, batch, count, self.ld_alpha, logprobs)
        reference = targets["reference"] if self.refers else torch.zeros_like(logps)
        tokens = torch.tensor(targets["tokens"], device=logps.device)
        nll = imitation(outputs, batch, count, logprobs)[0::2]
        return Pairs(
            logps[0::2], logps[1::2], reference[0::2], reference[1::2], tokens[0::2], tokens[1::2], nll,
            torch.tensor(targets["imitated"], device=logps.device), targets["nll_scale"],
        )  # fmt: skip

    def figures(self, pairs: Pairs) -> dict[str, torch.Tensor]:
        """Rewards, which are b (log policy - log reference), or what stands for them without a reference: each [P]."""
        chosen, rejected = pairs.chosen_ratio.detach(), pairs.rejected_ratio.detach()
        if self.trainer_id == "orpo" or (self.trainer_id in ("cpo", "simpo") and self.config.loss in ("ipo", "simpo")):
            chosen, rejected = chosen / pairs.chosen_tokens, rejected / pairs.rejected_tokens
        beta = self.options.beta
        found = {
            "rewards_chosen": beta * chosen, "rewards_rejected": beta * rejected, "reward_margin": beta * (chosen - rejected),
            "reward_accuracy": (chosen > rejected).float(), "logps_chosen": pairs.chosen, "logps_rejected": pairs.rejected,
        }  # fmt: skip
        if not self.imitates:
            return found
        of_tokens = self.trainer_id != "dpo" or "sft" in self.config.losses  # RPO's is a mean over pairs
        return found | {"nll": pairs.nll * pairs.nll_scale if of_tokens else pairs.nll / pairs.nll_tokens}

    @property
    def imitates(self) -> bool:
        config = self.config
        if self.trainer_id == "dpo":
            return "sft" in config.losses or config.rpo_alpha is not None
        return self.trainer_id == "orpo" or config.cpo_alpha != 0

    # --- what a pass needs --------------------------------------------------------------------------------------------

    def targets(self, batch: Batch, groups: Sequence[Sequence[Sample]]) -> dict[str, Any]:
        if self.whole:
            if any(sample.media for group in groups for sample in group):
                raise RequestError("trainer.orpo: rows with media have prompts that cannot be imitated; set trainer.nll=answer")
            imitate_prompts(batch)
        return {
            "tokens": [weight_of(sample) for group in groups for sample in group],
            "imitated": [weight_of(group[0], self.whole) for group in groups],
        }

    def _ready(self, steps: Any, batches: list[Batch]) -> None:
        super()._ready(steps, batches)
        scale = 1.0
        if self.imitates:
            scale = self._eval_scale if self.evaluating else self._scale(batches)
        for batch in batches:
            batch.targets["nll_scale"] = scale

    def _scale(self, batches: Sequence[Batch]) -> float:
        """Pairs / imitated tokens of the step: what is imitated is a mean over tokens, in any passes. Collective."""
        mine = sum(batch.weight for batch in batches), sum(sum(batch.targets["imitated"]) for batch in batches)
        pairs, tokens = (sum(values) for values in zip(*everywhere(mine), strict=True))
        return pairs / tokens if tokens else 1.0

    @cached_property
    def _eval_scale(self) -> float:
        """The same of all that is evaluated, which every rank can read."""
        held = self.run.data.eval
        tokens = sum(weight_of(parts(held[n])[0], self.whole) for n in range(len(held)))
        return len(held) / tokens if tokens else 1.0

    def _evaluate(self, steps: Any, state: Progress, held: Samples) -> None:
        self.evaluating = True
        try:
            super()._evaluate(steps, state, held)
        finally:
            self.evaluating = False
