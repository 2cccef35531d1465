"""What preference trainers share: groups of samples in passes, the reference, and the figures of steps and evaluations.

The loop is the supervised one. A batch's `targets` hold what its loss needs: `keys` of its groups where the reference was
computed ahead, `reference` [S], and what a subclass adds. Shapes: S samples of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from swift_core.errors import RequestError
from swift_core.parts import parts
from swift_core.types import Batch, Run, Sample, Stream, TunedModel
from swift_plugin_supervised.feed import share_of_rank
from swift_plugin_supervised.groups import group_batches
from swift_plugin_supervised.loop import Progress, SupervisedTrainer

from swift_plugin_preference.ahead import Kept, key_of
from swift_plugin_preference.logps import answers
from swift_plugin_preference.meter import Meter, Watch

CHARTS = [
    "reward_accuracy", "reward_margin", "rewards_chosen", "rewards_rejected", "logps_chosen", "logps_rejected", "nll", "kl",
]  # fmt: skip
"""Figures that the report draws."""


class PreferenceTrainer(SupervisedTrainer):
    """A subclass says by `size` how many samples a group has, by `refers` whether it needs a reference, by `coupled` whether
    the loss of one group depends on the others of a pass, and has `loss` and `targets`."""

    roles = ("reference",)
    size = 1
    refers = True
    coupled = False
    ld_alpha: float | None = None

    def __init__(self, run: Run) -> None:
        self.meter, self.reported = Meter(), dict[str, float]()
        self.kept: Kept | None = None
        super().__init__(run, partial(self.loss, self.meter), Watch(self.loss))

    def loss(self, meter: Meter, outputs: Any, batch: Batch) -> torch.Tensor:
        """The sum over groups of their losses. Their figures go into the meter."""
        raise NotImplementedError

    def targets(self, batch: Batch, groups: Sequence[Sequence[Sample]]) -> dict[str, Any]:
        """What the loss needs beside the reference."""
        raise NotImplementedError

    # --- the reference ------------------------------------------------------------------------------------------------

    @property
    def ahead(self) -> bool:
        return self.refers and bool(getattr(self.config, "reference_ahead", False))

    @property
    def names_reference(self) -> bool:
        return "reference" in self.run.config.models

    def _roles(self) -> dict[str, TunedModel]:
        if not self.refers and self.names_reference:
            raise RequestError("models.reference: this trainer, as it is set, has no reference; leave it out")
        if not self.refers or (self.ahead and (self.run.resume_from or not self.names_reference)):
            return {}
        if not self.names_reference and not self.ahead and self.run.warm_start:
            can = getattr(self.config, "loss", "") != "kto"
            self.run.events.warn(
                "the reference is the model without the adapter that the run begins with; "
                + ("trainer.reference_ahead=true takes the policy as it begins, " if can else "")
                + ("models.reference=FOLDER another model" if can else "models.reference=FOLDER takes another model")
            )
        return {"reference": self.run.models.get("reference")}

    def _begin(self, steps: Any, state: Progress) -> None:
        data = self.run.data.train
        first = data.window(state.window)[0] if isinstance(data, Stream) else data
        if len(first) and not self.fits(first[0]):
            raise RequestError("the samples are not of the row form that this trainer needs: its manifest names it by `rows`")
        if self.ahead:
            self._look_ahead(steps, state)

    def fits(self, sample: Sample) -> bool:
        """Whether a sample is of the row form that the trainer needs."""
        return len(parts(sample)) == self.size

    def _look_ahead(self, steps: Any, state: Progress) -> None:
        """Log-probabilities of the reference for all that is trained and evaluated on. Collective."""
        if isinstance(self.run.data.train, Stream):
            raise RequestError("trainer.reference_ahead: a stream cannot be gone through before training; set it to false")
        named, backend = self.run.config.models.get("reference"), self.run.backend
        models = [str(model) for model in (named, self.run.config.model, self.run.config.warm_start)]
        whose = [*models, self.ld_alpha, backend.describe().get("precision")]
        self.kept = Kept(self.run.output / "reference", whose)
        self.kept.read()
        if state.step:
            self._check_kept()
            return
        role = "reference" if named else "policy"  # which has not been trained yet
        for samples in (self.run.data.train, self.run.data.eval):
            mine = share_of_rank(range(len(samples)), backend.rank, backend.world)
            chunks = [mine[at : at + self.config.batch_size] for at in range(0, len(mine), self.config.batch_size)]
            tracked = self.run.events.track(chunks, "log-probabilities of the reference")
            batches = (batch for chunk in tracked for batch in self._batches([samples[n] for n in chunk]))
            self.kept.fill(((b.targets["keys"], partial(self._refer, steps, role, b)) for b in batches), backend.rank)
        backend.all_true(True)  # all are written
        self.kept.read()

    def _check_kept(self) -> None:
        """Raises RequestError on every rank where one finds that something is missing. Collective."""
        assert self.kept is not None
        kept, backend, whole = self.kept.values, self.run.backend, True
        for samples in (self.run.data.train, self.run.data.eval):
            mine = share_of_rank(range(len(samples)), backend.rank, backend.world)
            whole = whole and all(key_of(parts(samples[n])) in kept for n in mine)
        if not backend.all_true(whole):
            raise RequestError(
                f"trainer.reference_ahead: {self.kept.folder} lacks log-probabilities that were computed before the "
                "first step, and the policy has been trained since; begin again, or set it to false"
            )

    def _refer(self, steps: Any, role: str, batch: Batch) -> torch.Tensor:
        """Log-probabilities of a batch's answers under a role's model: [groups, samples of a group], without a gradient."""
        count = self.size * int(batch.weight)
        return answers(steps.forward(role, batch), batch, count, self.ld_alpha).detach().view(-1, self.size)

    def _ready(self, steps: Any, batches: list[Batch]) -> None:
        for batch in batches if self.refers else ():
            if self.kept is None:
                found = self._refer(steps, "reference", batch)
            else:
                found = self.kept.get(batch.targets["keys"]).to(self.run.backend.device)
            batch.targets["reference"] = found.flatten()

    # --- passes and figures -------------------------------------------------------------------------------------------

    def _batches(self, samples: list[Sample]) -> Iterator[Batch]:
        groups = [parts(sample) for sample in samples]
        limit = None if self.coupled else getattr(self.run.backend, "pass_tokens", None)
        for batch, members in group_batches(self.run.template, groups, self.flat, self.shares, limit):
            chosen = [groups[n] for n in members]
            batch.weight = float(len(chosen))
            batch.targets = self.targets(batch, chosen)
            if self.ahead:
                batch.targets["keys"] = [key_of(group) for group in chosen]
            yield batch

    def _extra(self) -> dict[str, Any]:
        self.reported = found = self.meter.result()
        if "reward_accuracy" not in found:
            return dict(found)
        told = f"  accuracy {found['reward_accuracy']:.0%}" + (
            f", margin {found['reward_margin']:.3f}" if "reward_margin" in found else ""
        )
        return {**found, "charts": [name for name in CHARTS if name in found], "told": told}

    def _metrics(self, state: Progress) -> dict[str, Any]:
        return {**super()._metrics(state), **({"train_metrics": self.reported} if self.reported else {})}
