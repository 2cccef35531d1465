"""The PPO loop, top to bottom: prompts, rollouts, rewards, log-probabilities and values, advantages, updates, log, save.

Rollouts, rewards, batches and stages are those of swift-plugin-grpo. The value model is trained by `Steps` of its own.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from swift_core.types import Batch, TrainResult
from swift_plugin_grpo import account
from swift_plugin_grpo.account import ToldGroup
from swift_plugin_grpo.batches import by_answer
from swift_plugin_grpo.on_policy import OnPolicyTrainer, State
from swift_plugin_grpo.scoring import Group, Scored
from swift_plugin_grpo.stages import gathered
from swift_plugin_supervised.feed import share_of_rank
from swift_plugin_supervised.schedule import learning_rate

from swift_plugin_ppo.advantages import estimate, moments, sums_of, token_rewards, whitened
from swift_plugin_ppo.critic import Both, Critic, values_of
from swift_plugin_ppo.losses import policy_loss, value_loss


@dataclass(slots=True)
class Lesson:
    """What is learned from an answer; all of its own tokens [N] float32."""

    answer: Scored
    values: torch.Tensor  # before the step
    rewards: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor


class PpoTrainer(OnPolicyTrainer):
    """Trainer `ppo`."""

    roles = ("reference", "value")

    def _fit(self) -> TrainResult:
        run, config, backend = self.run, self.config, self.run.backend
        tuned, steps, state = self._open()
        last_step = self.last_step
        both = Both(steps, self.critic.steps), Both(tuned, self.critic.tuned)
        first, since, stopped = state.step, time.perf_counter(), None
        saved = state.step if run.resume_from else -1
        while state.step < last_step and not stopped:
            step, started = state.step + 1, time.perf_counter()
            groups, everyone = self._collect(steps, state)
            lessons = self._lessons(steps, groups)
            figures = self._advantages(lessons)
            told: dict[str, float] = {}
            for part in self._minibatches(groups, everyone, step):
                state.updates += 1
                with self.stages.stage("update"):
                    self._update(steps, lessons, part, step, state, last_step, told)
            state.step = step
            figures |= _means(told)
            self._count(state, everyone, figures.get("loss", 0.0), time.perf_counter() - started)
            if step % config.log_every == 0 or step == last_step:
                left = (time.perf_counter() - since) / (step - first) * (last_step - step)
                self._report(state, groups, everyone, figures, last_step, left)
            if len(run.data.eval) and (step % (config.eval_every or last_step) == 0 or step == last_step):
                self._evaluate_rewards(steps, state)
            if not backend.all_true(run.stop is None):
                stopped = run.stop or "interrupted"
            if step % (config.save_every or last_step) == 0 or step == last_step or stopped or state.best_step == step:
                with self.stages.stage("save"):
                    self._save(*both, state)  # type: ignore[arg-type]
                saved = step
        if saved != state.step:
            self._save(*both, state)  # type: ignore[arg-type]
        return TrainResult(self._metrics(state), self.checkpoints.last(), self.checkpoints.best(), stopped)

    # --- before the first step ----------------------------------------------------------------------------------------

    def _open(self) -> tuple[Any, Any, State]:
        """Models, the engine, rewards and prompts. Raises RequestError for what does not go together."""
        run, config = self.run, self.config
        tuned = self._open_policy()
        optimizer = run.part("optimizer", config.optimizer) if config.optimizer else None
        self.critic = Critic(run, optimizer, config)
        roles = {"policy": tuned} | ({"reference": run.models.get("reference")} if config.kl else {})
        steps = run.backend.prepare(roles, optimizer, config)
        state = self._restored(steps, run.resume_from)
        self._open_rollouts(tuned, steps, self.critic.steps)
        trained = [sum(p.numel() for p in model.trainable().values()) for model in (tuned, self.critic.tuned)]
        run.events.note(
            f"training {trained[0]:,} parameters of the policy and {trained[1]:,} of the value model on "
            f"{run.backend.describe()['device']}: {self.last_step} steps of {config.batch_size * run.backend.world} prompts "
            f"x {config.generations} answers" + (f", from step {state.step}" if state.step else "")
        )
        if run.backend.rank == 0:
            self.checkpoints.forget_after(state.step)
        return tuned, steps, state

    # --- a step -------------------------------------------------------------------------------------------------------

    def _collect(self, steps: Any, state: State) -> tuple[list[Group], list[ToldGroup]]:
        """This rank's scored groups, and what all ranks know of all groups."""
        config, backend = self.config, self.run.backend
        with self.stages.stage("sync"):
            self.weights.sync(steps, state.step)
        numbers = range(state.position, state.position + config.batch_size * backend.world)
        state.position += len(numbers)
        own = self.prompts.draw(share_of_rank(numbers, backend.rank, backend.world))
        groups = self._score(self.rollouts.make(own, config.generations))
        return groups, self._told(groups)

    def _lessons(self, steps: Any, groups: Sequence[Group]) -> dict[int, Lesson]:
        """By id of the answer: the old policy's log-probabilities, the reference's, values, and rewards of tokens."""
        found: dict[int, Lesson] = {}
        heat = self.config.temperature
        with self.stages.stage("log-probabilities"):
            for batch, answers in self.batcher.of([group.answers for group in groups]):
                outputs = steps.forward("policy", batch)
                old = by_answer(outputs.logprobs(heat), answers)
                plain = old if heat == 1 else by_answer(outputs.logprobs(), answers)
                values = by_answer(self.critic.forward(batch), answers)
                reference: list[Any] = [None] * len(answers)
                if self.config.kl:
                    reference = by_answer(steps.forward("reference", batch).logprobs(heat), answers)
                for answer, mine, own, other, value in zip(answers, old, plain, reference, values, strict=True):
                    answer.old, answer.plain, answer.reference = mine, own, other
                    found[id(answer)] = self._lesson(answer, value)
        return found

    def _lesson(self, answer: Scored, values: torch.Tensor) -> Lesson:
        config = self.config
        score = answer.score - (config.missing_end if answer.rollout.truncated else 0.0)
        assert answer.old is not None
        divergence = None if answer.reference is None else answer.old - answer.reference
        rewards = token_rewards(score, divergence, config.kl, len(values))
        return Lesson(answer, values, rewards, values, values)

    def _advantages(self, lessons: dict[int, Lesson]) -> dict[str, float]:
        """Fill in advantages and returns, over all ranks where they are whitened; figures of the step."""
        config, all_of = self.config, list(lessons.values())
        if config.whiten_rewards:
            mean, variance = moments(gathered(sums_of([lesson.rewards for lesson in all_of])))
            for lesson in all_of:
                lesson.rewards = whitened(lesson.rewards, mean, variance, shift=False)
        for lesson in all_of:
            lesson.advantages, lesson.returns = estimate(lesson.rewards, lesson.values, config.gamma, config.lam)
        errors = moments(gathered(sums_of([lesson.returns - lesson.values for lesson in all_of])))
        returns = moments(gathered(sums_of([lesson.returns for lesson in all_of])))
        mean, variance = moments(gathered(sums_of([lesson.advantages for lesson in all_of])))
        if config.whiten:
            for lesson in all_of:
                lesson.advantages = whitened(lesson.advantages, mean, variance)
        figures = {"advantage_std": variance**0.5, "return": returns[0], "value_error": errors[0]}
        if returns[1] > 1e-12:
            figures["explained"] = 1 - errors[1] / returns[1]  # share of the returns' variance that the values tell
        apart = [lesson.answer for lesson in all_of]
        gaps = [lesson_gap(answer) for answer in apart if answer.rollout.length]
        figures["mismatch_max"] = max(gathered(max(gaps, default=0.0)))
        if config.kl:
            kls = [answer.old - answer.reference for answer in apart if answer.old is not None and answer.reference is not None]
            figures["kl"] = moments(gathered(sums_of(kls)))[0]
        return figures

    def _minibatches(self, groups: Sequence[Group], everyone: Sequence[ToldGroup], step: int) -> Iterator[list[list[Scored]]]:
        """This rank's answers of each update. Every rank yields alike, some perhaps without an answer."""
        config, own = self.config, {group.number: group.answers for group in groups}
        for number in range(config.updates):
            order = list(everyone)
            if config.minibatches > 1:
                random.Random(f"{self.run.config.seed}-{step}-{number}").shuffle(order)
            for n in range(config.minibatches):
                part = order[n * len(order) // config.minibatches : (n + 1) * len(order) // config.minibatches]
                if any(answer.length for group in part for answer in group.answers):
                    yield [own[group.number] for group in part if group.number in own]

    def _update(
        self, steps: Any, lessons: dict[int, Lesson], part: list[list[Scored]], step: int, state: State, last: int,
        told: dict[str, float],
    ) -> None:  # fmt: skip
        """One optimizer step of both models, on the mean over the minibatch's tokens. told: sums over this rank's tokens."""
        config = self.config
        batches = list(self.batcher.of(part))
        for batch, answers in batches:
            batch.targets = [lessons[id(answer)] for answer in answers]
        high = config.clip_low if config.clip_high is None else config.clip_high

        def joined(batch: Batch, name: str, like: torch.Tensor) -> torch.Tensor:
            found = [lesson.answer.old if name == "old" else getattr(lesson, name) for lesson in batch.targets]
            return torch.cat(found).to(like.device)

        def of_policy(outputs: Any, batch: Batch) -> torch.Tensor:
            logprobs = outputs.logprobs(config.temperature)
            old = joined(batch, "old", logprobs)
            loss, clipped = policy_loss(logprobs, old, joined(batch, "advantages", logprobs), config.clip_low, high)
            drift = (old - logprobs).detach()
            _add(told, "tokens", len(loss))
            _add(told, "loss", float(loss.detach().sum()))
            _add(told, "clipped", float(clipped.sum()))
            _add(told, "drift", float((0.5 * drift**2).sum()))
            return loss.sum()

        def of_value(outputs: Any, batch: Batch) -> torch.Tensor:
            values = values_of(outputs)
            loss, clipped = value_loss(
                values, joined(batch, "values", values), joined(batch, "returns", values), config.value_clip
            )
            _add(told, "value_tokens", len(loss))
            _add(told, "value_loss", float(loss.detach().sum()))
            _add(told, "value_clipped", float(clipped.sum()))
            return loss.sum()

        given = [batch for batch, _ in batches]
        whole = last * config.updates * config.minibatches
        rate, factor = learning_rate(state.updates, whole, config), (config.value_rate or config.learning_rate)
        value_rate = rate * factor / config.learning_rate
        told["rate"] = rate
        if step > config.value_warmup:
            tuned = self.run.models.get("policy")
            tuned.before_step(state.updates)
            steps.forward_backward(given, of_policy)
            told["norm"] = max(told.get("norm", 0.0), steps.optimizer_step(rate, config.clip))
            tuned.after_step(state.updates)
        self.critic.tuned.before_step(state.updates)
        self.critic.steps.forward_backward(given, of_value)
        told["value_norm"] = max(told.get("value_norm", 0.0), self.critic.steps.optimizer_step(value_rate, config.clip))
        self.critic.tuned.after_step(state.updates)

    # --- telling ------------------------------------------------------------------------------------------------------

    def _count(self, state: State, everyone: Sequence[ToldGroup], loss: float, seconds: float) -> None:  # type: ignore[override]
        state.loss_sum += loss
        state.tokens += sum(answer.length for group in everyone for answer in group.answers)
        state.seconds += seconds

    def _report(  # type: ignore[override]
        self,
        state: State,
        groups: Sequence[Group],
        everyone: Sequence[ToldGroup],
        found: dict[str, float],
        last: int,
        left: float,
    ) -> None:
        run = self.run
        found = account.figures(everyone, state.step - 1) | found
        state.reward, loss = found["reward"], found.pop("loss", 0.0)
        made = sum(answer.length for group in everyone for answer in group.answers)
        run.events.emit(
            "step", step=state.step, steps=last, loss=loss, learning_rate=found.pop("rate", 0.0),
            grad_norm=found.pop("norm", 0.0), tokens=made, trained_tokens=made,
            tokens_per_second=state.tokens / state.seconds, seconds_left=left, peak_bytes=run.backend.peak_bytes(),
            charts=["reward", "kl", "value_loss", "explained", "length"], told=self._line(found),
            **{name: value for name, value in found.items() if not math.isnan(value)}, **self._times(),
        )  # fmt: skip
        self._show_samples(state, groups)

    def _line(self, found: dict[str, float]) -> str:
        """A step's figures for people."""
        told = [f"reward {found['reward']:.3f} +- {found['reward_std']:.3f}", f"{found['length']:.0f} tokens an answer"]
        told += [f"{name} {found[name]:.4f}" for name in ("value_loss", "explained", "kl") if name in found]
        return "  " + "; ".join(told)


def lesson_gap(answer: Scored) -> float:
    """The largest difference between trainer's and engine's log-probabilities of an answer's tokens."""
    assert answer.plain is not None
    return float((answer.plain - torch.tensor(answer.rollout.logprobs)).abs().amax())


def _add(told: dict[str, float], name: str, value: float) -> None:
    told[name] = told.get(name, 0.0) + value


def _means(told: dict[str, float]) -> dict[str, float]:
    """Means over the tokens of all updates and ranks, and the largest gradient norms. Collective."""
    parts = gathered(told)
    whole = {name: sum(part.get(name, 0.0) for part in parts) for part in parts for name in part}
    found = {name: max(part.get(name, 0.0) for part in parts) for name in ("rate", "norm", "value_norm") if name in whole}
    for names, count in ((("loss", "clipped", "drift"), "tokens"), (("value_loss", "value_clipped"), "value_tokens")):
        found |= {name: whole[name] / whole[count] for name in names if whole.get(count)}
    return found
