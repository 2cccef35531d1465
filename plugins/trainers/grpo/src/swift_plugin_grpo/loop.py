"""The on-policy loop, top to bottom: prompts, rollouts, rewards, log-probabilities, advantages, updates, log, save.

Algorithms of the family differ in the parts that the options choose (`advantages`, `losses`), not in the loop. All arithmetic
goes through the backend's `Steps`, all answers come from the run's `Engine`.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from swift_core.types import Batch, Run, TrainResult
from swift_plugin_supervised.feed import share_of_rank
from swift_plugin_supervised.schedule import learning_rate

from swift_plugin_grpo import account
from swift_plugin_grpo.account import Sums, ToldGroup
from swift_plugin_grpo.advantages import advantages
from swift_plugin_grpo.ahead import Ahead
from swift_plugin_grpo.batches import by_answer, live, tokens_of
from swift_plugin_grpo.losses import high_entropy, normaliser, policy_loss, sft_share, supervised_loss
from swift_plugin_grpo.on_policy import OnPolicyTrainer, State
from swift_plugin_grpo.rollouts import Rollout
from swift_plugin_grpo.scoring import Group, Scored
from swift_plugin_grpo.stages import gathered

FAR = 0.05  # of log-probabilities, on average: more than the roundings of two implementations in one precision


class GrpoTrainer(OnPolicyTrainer):
    """Trainer `grpo` and its presets."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        config = self.config
        self.needs_reference = config.kl > 0
        several = config.updates * config.minibatches > 1
        self.kl_in_reward = self.needs_reference and config.kl_in == "reward"
        self.needs_old = config.old == "trainer" and (several or self.kl_in_reward)
        self.warned = False
        self.needs_entropies = config.exact_entropy or config.entropy_share < 1

    def _fit(self) -> TrainResult:
        run, config, backend = self.run, self.config, self.run.backend
        tuned, steps, state = self._open()
        last_step = self.last_step
        first, since, stopped = state.step, time.perf_counter(), None
        saved = state.step if run.resume_from else -1
        while state.step < last_step and not stopped:
            step, started = state.step + 1, time.perf_counter()
            groups, everyone, drawn = self._collect(steps, state)
            if self.kl_in_reward:
                self._log_probabilities(steps, groups)
                everyone = self._diverged(groups)
            self._advantages(groups, everyone)
            if not self.kl_in_reward:  # of those alone that can have a gradient
                self._log_probabilities(steps, groups)
            losses, sums = [], Sums()
            for update in self._updates(groups, everyone, step):
                state.updates += 1
                tuned.before_step(state.updates)
                rate = learning_rate(state.updates, last_step * config.updates * config.minibatches, config)
                with self.stages.stage("update"):
                    losses.append(self._update(steps, *update, step, rate, sums))
                tuned.after_step(state.updates)
            state.step = step
            self._count(state, drawn, losses, time.perf_counter() - started)
            if step % config.log_every == 0 or step == last_step:
                left = (time.perf_counter() - since) / (step - first) * (last_step - step)
                self._report(state, groups, drawn, losses, sums, last_step, left)
            if len(run.data.eval) and (step % (config.eval_every or last_step) == 0 or step == last_step):
                self._evaluate_rewards(steps, state)
            if not backend.all_true(run.stop is None):
                stopped = run.stop or "interrupted"
            if step % (config.save_every or last_step) == 0 or step == last_step or stopped or state.best_step == step:
                with self.stages.stage("save"):
                    self._save(steps, tuned, state)
                saved = step
        if saved != state.step:
            self._save(steps, tuned, state)
        return TrainResult(self._metrics(state), self.checkpoints.last(), self.checkpoints.best(), stopped)

    # --- before the first step ----------------------------------------------------------------------------------------

    def _open(self) -> tuple[Any, Any, State]:
        """Models, the engine, rewards and prompts. Raises RequestError for what does not go together."""
        run, config = self.run, self.config
        tuned = self._open_policy()
        roles = {"policy": tuned} | ({"reference": run.models.get("reference")} if self.needs_reference else {})
        optimizer = run.part("optimizer", config.optimizer) if config.optimizer else None
        steps = run.backend.prepare(roles, optimizer, config)
        state = self._restored(steps, run.resume_from)
        self._open_rollouts(tuned, steps)
        self.pending = Ahead(self.stages)
        self._tell_start(tuned, state)
        if run.backend.rank == 0:
            self.checkpoints.forget_after(state.step)
        return tuned, steps, state

    def _tell_start(self, tuned: Any, state: State) -> None:
        run, config = self.run, self.config
        trained = sum(p.numel() for p in tuned.trainable().values())
        whole = sum(p.numel() for p in tuned.model.parameters())
        where = "in this process" if self.weights.inside else "in another process"
        sent = "as adapters" if self.weights.by_adapter else "whole"
        run.events.note(
            f"training {trained:,} of {whole:,} parameters ({trained / whole:.2%}) on {run.backend.describe()['device']}: "
            f"{self.last_step} steps of {config.batch_size * run.backend.world} prompts x {config.generations} answers"
            + (f", from step {state.step}" if state.step else "")
        )
        run.events.note(
            f"rollouts {where}" + ("" if self.weights.inside else f", weights sent {sent}")
            + (", one step ahead" if config.ahead else "") + (", prompts computed once a group" if self.shares else "")
        )  # fmt: skip
        if config.top_p < 1 or config.top_k or config.min_p or config.repetition_penalty != 1:
            run.events.note("rollouts are drawn from a cut distribution; log-probabilities are those of the whole one")
        if run.resume_from and config.ahead:
            run.events.note("rollouts made ahead are made anew: this continuation is not exact")

    # --- rollouts and rewards -----------------------------------------------------------------------------------------

    def _collect(self, steps: Any, state: State) -> tuple[list[Group], list[ToldGroup], list[ToldGroup]]:
        """This rank's scored groups, what all ranks know of all groups that are trained on, and of all that were drawn.

        Groups without signal are drawn anew `resample` times; what then still lacks is filled with those of the last draw.
        """
        config, backend = self.config, self.run.backend
        wanted = config.batch_size * backend.world
        self._sync(steps, state.step)
        mine: list[Group] = []
        everyone: list[ToldGroup] = []
        drawn: list[ToldGroup] = []
        for attempt in range(config.resample + 1):
            numbers = range(state.position, state.position + wanted - len(everyone))
            state.position += len(numbers)
            own = self.prompts.draw(share_of_rank(numbers, backend.rank, backend.world))
            made = self.pending.take(own, partial(self.rollouts.make, own, config.generations))
            if config.ahead:
                self._begin_next(steps, state)
            groups = self._score(made)
            told = self._told(groups)
            drawn += told
            last = attempt == config.resample
            good = {group.number for group in told if last or account.signal(group)}
            mine += [group for group in groups if group.number in good]
            everyone += [group for group in told if group.number in good]
            if len(everyone) == wanted:
                break
        return mine, sorted(everyone, key=lambda group: group.number), drawn

    def _sync(self, steps: Any, version: int) -> None:
        if self.config.ahead and self.pending.waits:
            return  # the engine is at work with the weights before these
        with self.stages.stage("sync"):
            self.weights.sync(steps, version)

    def _begin_next(self, steps: Any, state: State) -> None:
        """Have the next step's rollouts made with the present weights, while this step is trained on."""
        if state.step + 1 >= self.last_step:
            return
        with self.stages.stage("sync"):
            self.weights.sync(steps, state.step)
        backend = self.run.backend
        numbers = range(state.position, state.position + self.config.batch_size * backend.world)
        own = self.prompts.draw(share_of_rank(numbers, backend.rank, backend.world))
        self.pending.begin(own, partial(self.rollouts.make, own, self.config.generations))

    def _score(self, made: Sequence[Sequence[Rollout]]) -> list[Group]:
        groups = super()._score(made)
        if self.config.sft:
            for group in groups:
                row = group.answers[0].rollout.row
                if row["messages"][-1]["role"] == "assistant":
                    group.expert = self.run.template.encode(row)[0]
        return groups

    # --- log-probabilities and advantages -----------------------------------------------------------------------------

    def _log_probabilities(self, steps: Any, groups: Sequence[Group]) -> None:
        """Those of the old policy, where more than one update needs them, of the reference, and entropies."""
        heat = self.config.temperature
        if self.config.old == "engine":
            for answer in (answer for group in groups for answer in group.answers):
                answer.old = torch.tensor(answer.rollout.logprobs)
        if not (self.needs_old or self.needs_reference or self.needs_entropies):
            return
        with self.stages.stage("log-probabilities"):
            for batch, answers in self.batcher.of(live(groups)):
                if self.needs_old or self.needs_entropies:
                    outputs = steps.forward("policy", batch)
                    if self.needs_old:
                        self._note(answers, "old", outputs.logprobs(heat))
                        if heat != 1:
                            self._note(answers, "plain", outputs.logprobs())
                    if self.needs_entropies:
                        self._note(answers, "entropies", outputs.entropies(heat))
                if self.needs_reference:
                    self._note(answers, "reference", steps.forward("reference", batch).logprobs(heat))

    def _note(self, answers: Sequence[Scored], name: str, values: torch.Tensor) -> None:
        for answer, own in zip(answers, by_answer(values, answers), strict=True):
            setattr(answer, name, own)

    def _diverged(self, groups: Sequence[Group]) -> list[ToldGroup]:
        """What all ranks know, the divergence taken from the rewards."""
        told = self._told(groups)
        for answer in (answer for group in told for answer in group.answers):
            answer.score -= self.config.kl * answer.kl
        return told

    def _advantages(self, groups: Sequence[Group], everyone: Sequence[ToldGroup]) -> None:
        """Of all answers of the step at once; the same on every rank."""
        scores = torch.tensor([[answer.score for answer in group.answers] for group in everyone], dtype=torch.float32)
        parts = self.scoring.table([[answer.scores for answer in group.answers] for group in everyone])
        weights = torch.tensor(list(self.scoring.weights.values()))
        found = advantages(self.config.advantage, scores, parts, weights, self.config.whiten)
        self.found = {group.number: row for group, row in zip(everyone, found.tolist(), strict=True)}
        for group in groups:
            for answer, advantage in zip(group.answers, self.found[group.number], strict=True):
                answer.advantage = advantage
                answer.live = self._live(advantage, answer.rollout.length, answer.rollout.truncated)

    def _live(self, advantage: float, length: int, truncated: bool) -> bool:
        """Whether an answer can have a gradient: one that cannot is not computed."""
        if not length or (truncated and self.config.overlong == "filter"):
            return False
        return advantage != 0 or (self.config.kl > 0 and self.config.kl_in == "loss")

    # --- updates ------------------------------------------------------------------------------------------------------

    def _updates(self, groups: Sequence[Group], everyone: Sequence[ToldGroup], step: int) -> Any:
        """For each optimizer step its own groups, and what all ranks know of all of its groups. Every rank yields alike."""
        config, own = self.config, {group.number: group for group in groups}
        for number in range(config.updates):
            order = list(everyone)
            if config.minibatches > 1:
                random.Random(f"{self.run.config.seed}-{step}-{number}").shuffle(order)
            for n in range(config.minibatches):
                part = order[n * len(order) // config.minibatches : (n + 1) * len(order) // config.minibatches]
                if self._weight(part, step)[0]:
                    yield [own[group.number] for group in part if group.number in own], part, everyone

    def _weight(self, part: Sequence[ToldGroup], step: int) -> tuple[float, int, int, float]:
        """Of a minibatch, all ranks together: the weight of what is computed, answers, tokens that count, expert weight."""
        computed, answers, tokens = 0.0, 0, 0
        for group in part:
            for answer, advantage in zip(group.answers, self.found[group.number], strict=True):
                answers += 1
                if not (answer.truncated and self.config.overlong == "filter"):
                    tokens += answer.length
                if self._live(advantage, answer.length, answer.truncated):
                    computed += answer.length
        expert = sum(group.expert for group in part) if sft_share(step, self.config) else 0.0
        return computed + expert, answers, tokens, expert

    def _update(
        self,
        steps: Any,
        groups: Sequence[Group],
        part: Sequence[ToldGroup],
        everyone: Sequence[ToldGroup],
        step: int,
        rate: float,
        sums: Sums,
    ) -> tuple[float, float]:
        """One optimizer step; its loss, and the gradient's norm before clipping."""
        config = self.config
        computed, count, tokens, expert = self._weight(part, step)
        whole = self._weight(everyone, step)[2]
        share = sft_share(step, config)
        # `Steps` divides by the weight of what is computed; the loss has a divisor of its own.
        scale = computed / normaliser(config, count, tokens, whole) * (1 - share if expert else 1.0)
        kept_from = self._threshold(part, groups) if config.entropy_share < 1 else None
        batches = list(self.batcher.of(live(groups)))
        members = {id(batch): answers for batch, answers in batches}
        experts = [group.expert for group in groups if group.expert is not None] if expert else []
        mixed = list(self.batcher.samples(experts)) if experts else []

        def loss_fn(outputs: Any, batch: Batch) -> torch.Tensor:
            if id(batch) not in members:
                weights = batch.weights[:, 1:][outputs.trained]
                return supervised_loss(outputs.logprobs(), weights, config.sft_phi) * (share * computed / expert)
            logprobs, given = outputs.logprobs(config.temperature), tokens_of(outputs, batch, members[id(batch)], kept_from)
            if config.temperature != 1 and given.old is None:  # the present policy is the old one
                with torch.no_grad():
                    given.plain = outputs.logprobs()
            found = policy_loss(logprobs, given, config)
            sums.add(len(logprobs), found.figures)
            return found.total * scale

        result = steps.forward_backward([*(batch for batch, _ in batches), *mixed], loss_fn)
        return result.loss, steps.optimizer_step(rate, config.clip)

    def _threshold(self, part: Sequence[ToldGroup], groups: Sequence[Group]) -> float:
        own = [answer.entropies for group in groups for answer in group.answers if answer.live and answer.entropies is not None]
        found = [entropies for entropies in gathered(torch.cat(own) if own else torch.zeros(0)) if len(entropies)]
        return high_entropy(torch.cat(found), self.config.entropy_share) if found else 0.0

    # --- telling ------------------------------------------------------------------------------------------------------

    def _count(self, state: State, drawn: Sequence[ToldGroup], losses: Any, seconds: float) -> None:  # type: ignore[override]
        state.loss_sum += sum(loss for loss, _ in losses) / max(1, len(losses))
        made = sum(answer.length for group in drawn for answer in group.answers)
        state.tokens += made
        state.seconds += seconds

    def _report(  # type: ignore[override]
        self, state: State, groups: Sequence[Group], drawn: Sequence[ToldGroup], losses: Any, sums: Sums, last: int, left: float
    ) -> None:
        run, config = self.run, self.config
        found = account.figures(drawn, state.step - 1) | Sums.means(gathered(sums))
        if self.needs_entropies:
            own = torch.cat([a.entropies for g in groups for a in g.answers if a.entropies is not None] or [torch.zeros(0)])
            all_of = torch.cat(gathered(own))
            found["entropy"] = float(all_of.mean()) if len(all_of) else math.nan
        state.reward = found["reward"]
        if found.get("mismatch", 0.0) > FAR and config.mismatch == "none" and not self.warned:
            self.warned = True
            why = "compute both in one precision, or" if not config.ahead else "the engine's weights are a step old;"
            run.events.warn(
                f"engine and trainer differ by {found['mismatch']:.3f} in the log-probability of a token: {why} "
                "correct it with trainer.mismatch=truncate"
            )
        answers = sum(len(group.answers) for group in drawn)
        made = sum(answer.length for group in drawn for answer in group.answers)
        rate = learning_rate(max(1, state.updates), last * config.updates * config.minibatches, config)
        run.events.emit(
            "step", step=state.step, steps=last, loss=sum(loss for loss, _ in losses) / max(1, len(losses)), learning_rate=rate,
            grad_norm=max((norm for _, norm in losses), default=0.0), tokens=made, trained_tokens=made,
            tokens_per_second=state.tokens / state.seconds, seconds_left=left, peak_bytes=run.backend.peak_bytes(),
            updates=len(losses), prompts=len(drawn), answers=answers, weights=state.step - 1,
            charts=[name for name in account.CHARTS if name in found or name == "grad_norm"], told=self._line(found, losses),
            **{name: value for name, value in found.items() if not math.isnan(value)}, **self._times(),
        )  # fmt: skip
        self._show_samples(state, groups)

    def _line(self, found: dict[str, float], losses: Any) -> str:
        """A step's figures for people."""
        told = [
            f"reward {found['reward']:.3f} +- {found['reward_std']:.3f}",
            *([f"{found['no_signal']:.0%} of groups without signal"] if found["no_signal"] else []),
            f"{found['length']:.0f} tokens an answer" + (f", {found['truncated']:.0%} cut" if found["truncated"] else ""),
            *([f"kl {found['kl']:.4f}"] if "kl" in found else []),
            *([] if losses else ["nothing to learn from: no update"]),
        ]
        return "  " + "; ".join(told)

    def _evaluate_rewards(self, steps: Any, state: State) -> None:
        if self.pending.waits:
            self.pending.wait()  # the engine answers with one version at a time
        super()._evaluate_rewards(steps, state)
