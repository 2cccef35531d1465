"""The supervised loop with a teacher: rows, or the model's own answers to them; the teacher's distributions; their divergence.

Of the steps' rows those that are answered by the model are set aside when the batches are made, perhaps ahead in a thread, and
answered when the step begins, with its weights.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from swift_core.types import Batch, Run, Sample, Samples, TrainResult, TunedModel
from swift_plugin_grpo.stages import Stages, gathered
from swift_plugin_supervised.feed import Feed, cut, share_of_rank
from swift_plugin_supervised.loop import Progress, SupervisedTrainer

from swift_plugin_distill.answers import Answers, chosen
from swift_plugin_distill.divergence import divergence
from swift_plugin_distill.rows import is_prompt
from swift_plugin_distill.teachers import open_teacher


class Meter:
    """KL(teacher | student) per unit of weight, over all ranks."""

    def __init__(self) -> None:
        self.kl = self.weight = 0.0

    def result(self) -> dict[str, float]:
        """And begin anew. Collective."""
        found = gathered([self.kl, self.weight])
        self.kl = self.weight = 0.0
        kl, weight = (sum(values) for values in zip(*found, strict=True))
        return {"kl": kl / weight} if weight else {}


class GkdTrainer(SupervisedTrainer):
    """Trainer `gkd`."""

    roles = ("teacher", "reference")

    def __init__(self, run: Run) -> None:
        super().__init__(run, self.loss, self)
        self.meter = self.train_meter = Meter()
        self.eval_meter = Meter()
        self.pending: deque[list[Sample]] = deque()
        self.answers: Answers | None = None
        self.width = 0
        self.step = 0
        self.evaluating = False

    def fit(self) -> TrainResult:
        with ExitStack() as self.stack:
            self.teacher = open_teacher(self.run, self.stack)
            self.stages = Stages(self.config.timeouts, 1800.0, "trainer.timeouts")
            return super().fit()

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        config, weights = self.config, batch.weights[:, 1:][outputs.trained]
        loss, kl = divergence(
            outputs, batch.targets["teacher"], weights, config.beta, config.temperature, config.tail, config.chunk
        )
        self.meter.kl += float(kl)
        self.meter.weight += float(weights.sum())
        return loss

    # --- what the loop calls --------------------------------------------------------------------------------------------

    def _roles(self) -> dict[str, TunedModel]:
        return self.teacher.roles()

    def _begin(self, steps: Any, state: Progress) -> None:
        self.step = state.step
        self.width = _width(self.run.models.get("policy"), self.run)
        held = self.run.data.eval
        if self.config.on_policy or any(is_prompt(held[n]) for n in range(len(held))):
            self._open_answers()

    def _open_answers(self) -> Answers:
        self.answers = Answers(self.run, self.run.models.get("policy"))
        self.stack.callback(self.answers.close)
        return self.answers

    def _made(self, feed: Feed, step: int) -> tuple[list[Batch], tuple[int, int]]:
        config, seed = self.config, self.run.config.seed
        own: list[Sample] = []
        batches: list[Batch] = []
        for samples in feed.passes(step, self.run.backend.rank):
            mine = [sample for sample in samples if chosen(sample, seed, step, config.on_policy)]
            rest = [sample for sample in samples if not chosen(sample, seed, step, config.on_policy)]
            own += mine
            batches += self._batches(rest) if rest else ()
        self.pending.append(own)
        return batches, (feed.position, feed.first)

    def _batches(self, samples: list[Sample]) -> Iterator[Batch]:
        template = self.run.template
        parts = cut(samples, getattr(self.run.backend, "pass_tokens", None)) if self.flat else [samples]
        for part in parts:
            packed = template.pack(part, share=self.shares) if self.flat else None
            batch = template.collate([packed] if packed else part)
            batch.targets = {"samples": part}
            yield batch

    def _ready(self, steps: Any, batches: list[Batch]) -> None:
        if not self.evaluating:
            own = self.pending.popleft()
            if self.answers is not None or any(gathered(bool(own))):  # though on_policy is 0, a row has no answer
                made = (self.answers or self._open_answers()).make(steps, own, self.step)
                size = self.config.batch_size
                for at in range(0, len(made), size):
                    batches += self._batches(made[at : at + size])
            self.step += 1
        with self.stages.stage("teacher"):
            for batch in batches:
                told = self.teacher.tell(steps, batch, batch.targets["samples"], self.width)
                batch.targets = {"teacher": told}

    def _evaluate(self, steps: Any, state: Progress, held: Samples) -> None:
        """Rows without an answer are answered, the same way each time but for the weights."""
        self.evaluating = True
        try:
            super()._evaluate(steps, state, self._answered(steps, held))
        finally:
            self.evaluating = False

    def _answered(self, steps: Any, held: Samples) -> Samples:
        if self.answers is None:
            return held
        backend = self.run.backend
        mine = [n for n in share_of_rank(range(len(held)), backend.rank, backend.world) if is_prompt(held[n])]
        lengths, self.answers.lengths = self.answers.lengths, []
        made = self.answers.make(steps, [held[n] for n in mine], self.step, drawn=0)
        self.answers.lengths = lengths
        by_row = {sample.row: sample for sample in made}
        return Answered(held, {n: by_row[held[n].row] for n in mine if held[n].row in by_row})

    def _extra(self) -> dict[str, float]:
        found = self.train_meter.result()
        if self.answers is None:
            return found
        lengths = [length for own in gathered(self.answers.lengths) for length in own]
        empty = sum(gathered(self.answers.empty))
        self.answers.lengths, self.answers.empty = [], 0
        found["own_answers"] = float(len(lengths))
        if lengths:
            found["own_length"] = sum(lengths) / len(lengths)
        if empty:
            found["own_empty"] = float(empty)
        seconds = self.answers.stages.take() | self.stages.take()
        return found | {f"seconds/{name}": value for name, value in seconds.items()}

    # --- the metric of an evaluation ------------------------------------------------------------------------------------

    def watching(self, loss_fn: Any) -> Any:
        self.meter = self.eval_meter
        return loss_fn

    def result(self) -> dict[str, float]:
        self.meter = self.train_meter
        return self.eval_meter.result()


class Answered:
    """Samples of which some are replaced."""

    def __init__(self, samples: Samples, instead: dict[int, Sample]) -> None:
        self.samples, self.instead = samples, instead

    @property
    def lengths(self) -> Any:
        return self.samples.lengths

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, n: int, /) -> Sample:
        return self.instead[n] if n in self.instead else self.samples[n]


def _width(tuned: Any, run: Run) -> int:
    """How many tokens the model has logits for; where it does not say, those of its tokenizer."""
    model = tuned.model
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = getattr(base, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    tokenizer = getattr(run.processor, "tokenizer", run.processor)
    return int(weight.shape[0]) if weight is not None and weight.ndim == 2 else len(tokenizer)
