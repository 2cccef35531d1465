"""The supervised loop, top to bottom: samples of the step, forward and backward, update, report, evaluate, save, stop.

All arithmetic goes through the backend's `Steps`, all rendering and collation through the template, so that the loop knows no
model family, no tuner and no device.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from swift_core.errors import RequestError
from swift_core.plan import write_json
from swift_core.rundir import Checkpoints
from swift_core.types import Batch, LossFn, Run, Sample, Samples, StepResult, Stream, TrainResult, TunedModel

from swift_plugin_supervised.feed import Feed, ahead, cut, share_of_rank
from swift_plugin_supervised.isolation import isolates, shares
from swift_plugin_supervised.schedule import learning_rate, total_steps


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
    figures: dict[str, float] = field(default_factory=dict)  # of the last evaluation, beside its loss
    window: int = 0  # of a stream: the record at which the present window begins
    window_step: int = 0  # and the step before its first one


def cross_entropy(outputs: Any, batch: Batch) -> torch.Tensor:
    """The sum over tokens of weight x -log p(token | tokens before it)."""
    loss: torch.Tensor = -(outputs.logprobs() * batch.weights[:, 1:][outputs.trained]).sum()
    return loss


REFUSED = {"masked_lm": "a masked language model: give it a head with trainer classify, tag, embed or rerank"}
"""Tasks of models that have no next token to predict."""


class SupervisedTrainer:
    """Trainer `sft` and `pt`; with another loss, those of other plugins.

    `metric` counts beside the loss of an evaluation: `watching(loss_fn)` is used in place of it, then `result()` gives figures.
    `roles` are those of the models beside the policy that a trainer may use.
    """

    roles: tuple[str, ...] = ()

    def __init__(self, run: Run, loss_fn: LossFn = cross_entropy, metric: Any = None) -> None:
        self.run, self.config, self.loss_fn, self.metric = run, run.trainer_config, loss_fn, metric
        self.checkpoints = Checkpoints(run.output)
        for role in run.config.models:
            if role not in self.roles:
                known = f"it may use {', '.join(self.roles)}" if self.roles else "it uses no other model"
                raise RequestError(f"models.{role}: this trainer has no such model; {known}")

    def fit(self) -> TrainResult:
        run, config, backend = self.run, self.config, self.run.backend
        tuned = run.models.get("policy")
        if why := REFUSED.get(getattr(getattr(tuned, "bundle", None), "task", "")):
            raise RequestError(f"model {tuned.bundle.source} is {why}")
        if run.resume_from:
            tuned.load(run.resume_from)
        elif run.warm_start:
            tuned.load(run.warm_start)
        optimizer = run.part("optimizer", config.optimizer) if config.optimizer else None
        steps = backend.prepare({"policy": tuned} | self._roles(), optimizer, config)
        state = self._restore(steps, run.resume_from) if run.resume_from else Progress()

        self.flat = self._lays_flat(steps, state.window)
        feed = Feed(run.data.train, config, self.flat, backend.world, run.config.seed)
        feed.seek(state.window, state.window_step)
        held = run.data.eval
        last_step = config.max_steps if feed.streams else total_steps(feed.epoch_steps, config)
        eval_every = config.eval_every or (last_step if feed.streams else feed.epoch_steps)
        save_every = config.save_every or eval_every
        trained = sum(p.numel() for p in tuned.trainable().values())
        whole = sum(p.numel() for p in tuned.model.parameters())
        run.events.note(
            f"training {trained:,} of {whole:,} parameters ({trained / whole:.2%}) on {backend.describe()['device']}: "
            f"{last_step} steps" + (f", from step {state.step}" if state.step else "")
        )
        self._tell_feed(feed)
        if backend.rank == 0:
            self.checkpoints.forget_after(state.step)
        self._begin(steps, state)
        saved, first, since = state.step if run.resume_from else -1, state.step, time.perf_counter()
        stopped = self._out_of_patience(state)  # a run that stopped early stays so when it is resumed
        made = self._ahead(partial(self._made, feed), range(state.step + 1, last_step + 1))
        while state.step < last_step and not stopped:
            step = state.step + 1
            started = time.perf_counter()
            tuned.before_step(step)
            batches, window = next(made)
            self._ready(steps, batches)
            result = steps.forward_backward(batches, self.loss_fn)
            rate = learning_rate(step, last_step, config)
            norm = steps.optimizer_step(rate, config.clip)
            tuned.after_step(step)
            self._count(state, step, result, time.perf_counter() - started)
            state.window, state.window_step = window
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
        made.close()
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

    def _lays_flat(self, steps: Any, window: int) -> bool:
        """Whether the samples of a pass are laid end to end instead of padded. Raises RequestError where packing asks for it
        and the model lets samples see each other. Sets `shares`: whether what they all begin with is computed once."""
        self.shares = False
        if self.config.padding == "always":
            return False
        data = self.run.data.train
        samples = data.window(window)[0] if isinstance(data, Stream) else data
        lack = isolates(steps, self.run.template, samples)
        if lack and self.config.packing:
            raise RequestError(f"trainer.packing: {lack}; set it to false")
        if lack:
            self.run.events.note(f"padding the samples of a pass: {lack}")
        self.shares = not lack and self.config.share_beginning and shares(steps, self.run.template, samples)
        return not lack

    def _tell_feed(self, feed: Feed) -> None:
        if self.config.packing and not feed.streams:
            tokens, capacity = sum(feed.samples.lengths), len(feed.rows) * self.config.max_length
            self.run.events.emit("packed", samples=len(feed.samples), packs=len(feed.rows), full=tokens / max(1, capacity))
            self.run.events.note(
                f"packed {len(feed.samples)} samples into {len(feed.rows)} of {self.config.max_length} tokens, "
                f"{tokens / max(1, capacity):.0%} full"
            )

    def _ahead(self, make: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """`make` of each item, ahead of the steps where the template says so."""
        release = getattr(self.run.backend, "release_threads", lambda: None)
        return ahead(make, items, getattr(self.run.template, "prefetch", 0), release)

    def _made(self, feed: Feed, step: int) -> tuple[list[Batch], tuple[int, int]]:
        """The batches of a step, and where the window begins that they are from."""
        batches = [batch for samples in feed.passes(step, self.run.backend.rank) for batch in self._batches(samples)]
        return batches, (feed.position, feed.first)

    def _batches(self, samples: list[Sample]) -> Iterator[Batch]:
        """The batches of one pass: one, padded or flat. A flat one is cut between samples where it holds more tokens than the
        backend gains by: the sum of the gradients is the same, and takes less memory."""
        template = self.run.template
        parts = cut(samples, getattr(self.run.backend, "pass_tokens", None)) if self.flat else [samples]
        for part in parts:
            packed = template.pack(part, share=self.shares) if self.flat else None
            yield template.collate([packed] if packed else part)

    def _roles(self) -> dict[str, TunedModel]:
        """For trainers that build on this one: models beside the policy, by role."""
        return {}

    def _begin(self, steps: Any, state: Progress) -> None:
        """Likewise: what is done before the first step, or the first after a resume."""

    def _ready(self, steps: Any, batches: list[Batch]) -> None:
        """Likewise: what a loss needs beside the policy's own pass, into `Batch.targets`. Called before the pass, for the
        batches of a step or for one to evaluate."""

    def _extra(self) -> dict[str, Any]:
        """Likewise: figures of the step for the log, `charts` and `told` (see `swift_core.events`)."""
        return {}

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
            seconds_left=left, peak_bytes=self.run.backend.peak_bytes(), **self._extra(),
        )  # fmt: skip

    def _evaluate(self, steps: Any, state: Progress, held: Samples) -> None:
        backend = self.run.backend
        mine = share_of_rank(range(len(held)), backend.rank, backend.world)
        size = self.config.batch_size
        parts = [mine[at : at + size] for at in range(0, len(mine), size)]
        made = self._ahead(lambda part: list(self._batches([held[n] for n in part])), parts)
        batches = (batch for found, _ in zip(made, self.run.events.track(parts, "evaluating"), strict=True) for batch in found)
        batches = (batch for batch in batches if self._ready(steps, [batch]) is None)
        loss = steps.evaluate(batches, self.metric.watching(self.loss_fn) if self.metric else self.loss_fn).loss
        state.figures = self.metric.result() if self.metric else {}
        better = state.best_loss is None or loss < state.best_loss
        if better:
            state.best_loss, state.best_step, state.waited = loss, state.step, 0
        else:
            state.waited += 1
        state.evals.append((state.step, loss))
        self.run.events.emit("eval", step=state.step, loss=loss, best=better, **state.figures)
        if state.figures:
            self.run.events.note(", ".join(f"{name} {value:.4f}" for name, value in state.figures.items()))

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
            **({"eval_metrics": state.figures} if state.figures else {}),
            "best_eval_loss": state.best_loss,
            "best_step": state.best_step,
            "tokens": state.tokens,
            "trained_tokens": state.trained_tokens,
            "tokens_per_second": round(state.tokens / state.seconds, 1) if state.seconds else None,
        }
