"""The supervised loop, top to bottom: rows of the step, forward and backward, update, report, evaluate, save, stop.

All arithmetic goes through the backend's `Steps`, all rendering and collation through the template, so that the loop knows no
model family, no tuner and no device.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from swift_core.errors import RequestError
from swift_core.plan import write_json
from swift_core.rundir import Checkpoints
from swift_core.types import Batch, Run, Sample, StepResult, TrainResult

from swift_plugin_supervised.schedule import learning_rate, rows_of_step, share_of_rank, total_steps


@dataclass
class Progress:
    """What a checkpoint carries of the loop itself."""

    step: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    waited: int = 0  # evaluations since the best
    loss_sum: float = 0.0  # of weight * mean loss over all steps
    weight_sum: float = 0.0
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0  # spent in steps
    evals: list[tuple[int, float]] = field(default_factory=list)


def cross_entropy(outputs: Any, batch: Batch) -> torch.Tensor:
    """The sum over tokens of weight x -log p(token | tokens before it). logits: [B, T, vocabulary]."""
    logits, labels, weights = outputs.logits[:, :-1], batch.labels[:, 1:], batch.weights[:, 1:]
    chosen = weights != 0  # logits of other positions are not even cast to fp32
    losses = torch.nn.functional.cross_entropy(logits[chosen].float(), labels[chosen], reduction="none")
    return (losses * weights[chosen]).sum()


class SupervisedTrainer:
    """Trainer `sft` and `pt`."""

    def __init__(self, run: Run) -> None:
        self.run, self.config = run, run.trainer_config
        self.checkpoints = Checkpoints(run.output)

    def fit(self) -> TrainResult:
        run, config, backend = self.run, self.config, self.run.backend
        tuned = run.models.get("policy")
        samples = self._pack(run.data.train) if config.packing else run.data.train
        held = self._pack(run.data.eval) if config.packing else run.data.eval
        if run.resume_from:
            tuned.load(run.resume_from)
        elif run.warm_start:
            tuned.load(run.warm_start)
        optimizer = run.part("optimizer", config.optimizer) if config.optimizer else None
        steps = backend.prepare({"policy": tuned}, optimizer, config)
        state = self._restore(steps, run.resume_from) if run.resume_from else Progress()

        rows_a_step = config.batch_size * config.accumulate * backend.world
        last_step = total_steps(len(samples), rows_a_step, config)
        epoch_steps = -(-len(samples) // rows_a_step)
        eval_every = config.eval_every or epoch_steps
        save_every = config.save_every or eval_every
        trained = sum(p.numel() for p in tuned.trainable().values())
        whole = sum(p.numel() for p in tuned.model.parameters())
        run.events.note(
            f"training {trained:,} of {whole:,} parameters ({trained / whole:.2%}) on {backend.describe()['device']}: "
            f"{last_step} steps of {rows_a_step} rows" + (f", from step {state.step}" if state.step else "")
        )
        if backend.rank == 0:
            self.checkpoints.forget_after(state.step)
        if config.packing:
            self._check_isolation(steps, samples)
        saved, first, since = state.step if run.resume_from else -1, state.step, time.perf_counter()
        stopped = self._out_of_patience(state)  # a run that stopped early stays so when it is resumed
        while state.step < last_step and not stopped:
            step = state.step + 1
            started = time.perf_counter()
            tuned.before_step(step)
            rows = rows_of_step(step, len(samples), rows_a_step, run.config.seed, config.shuffle)
            mine = share_of_rank(rows, backend.rank, backend.world)
            result = steps.forward_backward(list(self._batches([samples[n] for n in mine])), cross_entropy)
            rate = learning_rate(step, last_step, config)
            norm = steps.optimizer_step(rate, config.clip)
            tuned.after_step(step)
            self._count(state, step, result, time.perf_counter() - started)
            if step % config.log_every == 0 or step == last_step:
                left = (time.perf_counter() - since) / (step - first) * (last_step - step)
                self._report(state, result, rate, norm, last_step, left)
            if held and (step % eval_every == 0 or step == last_step):
                self._evaluate(steps, state, held)
            if not backend.all_true(run.stop is None):
                stopped = run.stop or "interrupted"
            else:
                stopped = self._out_of_patience(state)
            improved = state.best_step == step
            if step % save_every == 0 or step == last_step or improved or stopped:
                self._save(steps, tuned, state)
                saved = step
        if saved != state.step:
            self._save(steps, tuned, state)
        if stopped and stopped != "interrupted":
            run.events.note(f"stopped at step {state.step}: {stopped}")
        return TrainResult(self._metrics(state), self.checkpoints.last(), self.checkpoints.best(), stopped)

    def _restore(self, steps: Any, folder: Path) -> Progress:
        """Optimizer, random generators and progress of a checkpoint. Raises RequestError when a file is damaged."""
        steps.load(folder)
        file = folder / "trainer.json"
        try:
            state = Progress(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as err:
            raise RequestError(
                f"checkpoint {folder} cannot be resumed: {file.name}: {' '.join(str(err).split())}. "
                "Name an earlier one: trainer.resume=FOLDER"
            ) from err
        best = state.best_step
        if best is not None and self.run.backend.rank == 0 and self.checkpoints.path(best).is_dir():
            self.checkpoints.mark_best(best)  # a kill may have come between the checkpoint and its link
        return state

    def _out_of_patience(self, state: Progress) -> str | None:
        waited = self.config.patience is not None and state.waited >= self.config.patience
        return f"no better eval loss in {state.waited} evaluations" if waited else None

    def _batches(self, samples: list[Sample]) -> Iterator[Batch]:
        """Forward passes of at most batch_size samples, and of at most batch_tokens tokens where that is set."""
        chosen: list[Sample] = []
        for sample in samples:
            longest = max([len(sample.input_ids), *(len(s.input_ids) for s in chosen)])
            budget = self.config.batch_tokens
            full = len(chosen) == self.config.batch_size or (budget is not None and longest * (len(chosen) + 1) > budget)
            if chosen and (full or sample.segments):
                yield self.run.template.collate(chosen)
                chosen = []
            chosen.append(sample)
        if chosen:
            yield self.run.template.collate(chosen)

    def _pack(self, samples: list[Sample]) -> list[Sample]:
        """First-fit-decreasing packs of at most max_length tokens."""
        bins: list[tuple[int, list[Sample]]] = []
        for sample in sorted(samples, key=lambda s: -len(s.input_ids)):
            length = len(sample.input_ids)
            place = next((n for n, (used, _) in enumerate(bins) if used + length <= self.config.max_length), None)
            if place is None:
                bins.append((length, [sample]))
            else:
                bins[place][1].append(sample)
                bins[place] = (bins[place][0] + length, bins[place][1])
        packs = [self.run.template.pack(chosen) for _, chosen in bins]
        filled = sum(used for used, _ in bins) / max(1, len(bins) * self.config.max_length)
        self.run.events.note(
            f"packed {len(samples)} samples into {len(bins)} of {self.config.max_length} tokens, {filled:.0%} full"
        )
        if any(pack is None for pack in packs):
            raise RequestError("trainer.packing: this template cannot isolate packed samples; set it to false")
        return [pack for pack in packs if pack is not None]

    def _check_isolation(self, steps: Any, packs: list[Sample]) -> None:
        """Compare a pack's second sample with the same one alone. Raises RequestError where the model lets packed samples
        see each other, as state-space models and those without position ids do."""
        pack = next((pack for pack in packs if len(pack.segments) > 1), None)
        if pack is None:
            return
        first, end = pack.segments[0], pack.segments[0] + pack.segments[1]
        alone = Sample(pack.input_ids[first:end], pack.weights[first:end])
        both = steps.forward("policy", self.run.template.collate([pack])).logits[0, first:end].float()
        own = steps.forward("policy", self.run.template.collate([alone])).logits[0].float()
        gap, size = float((both - own).abs().max()), float(own.abs().max())
        if gap > 0.02 * size + 1e-4:
            raise RequestError(
                f"trainer.packing: this model lets packed samples see each other (logits differ by {gap:.2g}); set it to false"
            )

    def _count(self, state: Progress, step: int, result: StepResult, seconds: float) -> None:
        state.step = step
        state.loss_sum += result.loss * result.weight
        state.weight_sum += result.weight
        state.tokens += result.tokens
        state.trained_tokens += result.trained_tokens
        state.seconds += seconds

    def _report(self, state: Progress, result: StepResult, rate: float, norm: float, steps: int, left: float) -> None:
        self.run.events.emit(
            "step", step=state.step, steps=steps, loss=result.loss, learning_rate=rate, grad_norm=norm,
            tokens=result.tokens, trained_tokens=result.trained_tokens, tokens_per_second=state.tokens / state.seconds,
            seconds_left=left, peak_bytes=self.run.backend.peak_bytes(),
        )  # fmt: skip

    def _evaluate(self, steps: Any, state: Progress, held: list[Sample]) -> None:
        backend = self.run.backend
        mine = share_of_rank(list(range(len(held))), backend.rank, backend.world)
        batches = self.run.events.track(self._batches([held[n] for n in mine]), "evaluating")
        loss = steps.evaluate(batches, cross_entropy).loss
        better = state.best_loss is None or loss < state.best_loss
        if better:
            state.best_loss, state.best_step, state.waited = loss, state.step, 0
        else:
            state.waited += 1
        state.evals.append((state.step, loss))
        self.run.events.emit("eval", step=state.step, loss=loss, best=better)

    def _save(self, steps: Any, tuned: Any, state: Progress) -> None:
        """Write a checkpoint, whole or not at all. Raises RunError on every rank when one of them cannot."""
        backend, checkpoints, step = self.run.backend, self.checkpoints, state.step
        main, failure = backend.rank == 0, None
        folder = checkpoints.begin(step) if main else checkpoints.pending(step)
        backend.all_true(True)  # the folder is there
        try:
            steps.save(folder)
            if main:
                tuned.save(folder)
                write_json(folder / "trainer.json", asdict(state))
                self.run.plan.save(folder)
        except Exception as err:
            failure = err
        if backend.all_true(failure is None) and main:  # every rank has written its part
            try:
                checkpoints.commit(step)
            except OSError as err:
                failure = err
        if not backend.all_true(failure is None):
            raise checkpoints.abandon(step, failure or RuntimeError("another rank failed")) from failure
        if main:
            if state.best_step == step:
                checkpoints.mark_best(step)
            checkpoints.prune(self.config.keep)
            self.run.events.emit("checkpoint", step=step, path=str(checkpoints.path(step)))

    def _metrics(self, state: Progress) -> dict[str, Any]:
        return {
            "steps": state.step,
            "seconds": round(state.seconds, 3),
            "peak_bytes": self.run.backend.peak_bytes(),
            "train_loss": state.loss_sum / state.weight_sum if state.weight_sum else None,
            "eval_loss": state.evals[-1][1] if state.evals else None,
            "best_eval_loss": state.best_loss,
            "best_step": state.best_step,
            "tokens": state.tokens,
            "trained_tokens": state.trained_tokens,
            "tokens_per_second": round(state.tokens / state.seconds, 1) if state.seconds else None,
        }
