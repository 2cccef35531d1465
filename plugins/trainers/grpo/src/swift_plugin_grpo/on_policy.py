"""What on-policy trainers share: models, prompts, the engine and its rollouts, evaluation by reward, the summary.

A trainer's loop itself reads top to bottom in a file of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from swift_core.errors import CapabilityError, RequestError
from swift_core.types import Run, TrainResult
from swift_plugin_supervised.feed import share_of_rank
from swift_plugin_supervised.isolation import isolates, shares
from swift_plugin_supervised.loop import REFUSED, SupervisedTrainer

from swift_plugin_grpo import account
from swift_plugin_grpo.account import ToldGroup
from swift_plugin_grpo.batches import Batcher
from swift_plugin_grpo.config import TIMEOUT
from swift_plugin_grpo.environments import make_factory
from swift_plugin_grpo.prompts import Prompts
from swift_plugin_grpo.rollouts import Rollout, Rollouts, Sampling
from swift_plugin_grpo.scoring import Group, Scoring
from swift_plugin_grpo.stages import Stages, gathered
from swift_plugin_grpo.weights import Weights

WRITES = ("causal_lm", "seq2seq_lm")  # tasks of models that answer


@dataclass
class State:
    """What a checkpoint carries of the loop itself."""

    step: int = 0
    position: int = 0  # prompts drawn
    updates: int = 0  # optimizer steps
    best_loss: float | None = None  # the best evaluation's mean reward, negative
    best_step: int | None = None
    loss_sum: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    reward: float | None = None  # of the last step
    evals: list[tuple[int, float]] = field(default_factory=list)


class OnPolicyTrainer(SupervisedTrainer):
    """A subclass has `_fit`. The supervised loop's checkpoints are its own."""

    roles = ("reference",)

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.stages = Stages(self.config.timeouts, TIMEOUT, "trainer.timeouts")

    def fit(self) -> TrainResult:
        with ExitStack() as self.stack:
            return self._fit()

    def _fit(self) -> TrainResult:
        raise NotImplementedError

    # --- before the first step ----------------------------------------------------------------------------------------

    @cached_property
    def prompts(self) -> Prompts:
        return Prompts(self.run.data.train, self.run.config.seed, self.config.shuffle)

    @property
    def last_step(self) -> int:
        config = self.config
        steps = math.ceil(config.epochs * len(self.prompts) / (config.batch_size * self.run.backend.world))
        return int(config.max_steps or max(1, steps))

    def _open_policy(self) -> Any:
        """Rewards, and the policy as it begins. Raises RequestError for a model that cannot answer."""
        run = self.run
        self.scoring = Scoring(run.part, self.config.rewards, self.config, run.template, self.stack)
        if "reference" in run.config.models and not self.config.kl:
            run.events.warn("models.reference is not used: trainer.kl is 0")
        tuned = run.models.get("policy")
        task = getattr(getattr(tuned, "bundle", None), "task", "causal_lm")
        if why := REFUSED.get(
            task, "" if task in WRITES else f"a model with a head for {task}, and answers need one that writes"
        ):
            raise RequestError(f"model {tuned.bundle.source} is {why}")
        if self.config.kl and run.warm_start and "reference" not in run.config.models:
            run.events.warn(
                "the reference is the model without the weights that the run begins with; models.reference=FOLDER takes another"
            )
        if folder := run.resume_from or run.warm_start:
            tuned.load(folder)
        return tuned

    def _open_rollouts(self, tuned: Any, *prepared: Any) -> None:
        """Batches for the models of `prepared`, the policy's `Steps` first, and the engine that answers."""
        run, config = self.run, self.config
        self.flat = self._flat(prepared)
        self.shares = self.flat and config.share_beginning and shares(prepared[0], run.template, run.data.train)
        self.batcher = Batcher(run.template, self.flat, self.shares, getattr(run.backend, "pass_tokens", None))
        engine = run.engine()
        self._check_media(engine)
        self.weights = Weights(engine, tuned)
        self.stack.callback(self.weights.close)
        if getattr(config, "ahead", False) and self.weights.inside:
            raise CapabilityError(
                "trainer.ahead: the engine runs the model that is trained; use one in another process, vllm say"
            )
        world = make_factory(config.environment, run.part, config.environment_options) if config.environment else None
        sampling = Sampling(
            config.max_tokens, config.temperature, config.top_p, config.top_k, config.min_p, config.repetition_penalty,
            tuple(config.stop), tuple(getattr(getattr(run.template, "media", None), "placeholder_ids", ())),
        )  # fmt: skip
        given = (engine, run.template, self.weights, sampling, run.config.seed, self.stages, world, config.turns)
        self.rollouts = Rollouts(*given)

    def _check_media(self, engine: Any) -> None:
        """Raises where prompts have media, and the engine or an environment takes text only."""
        held = (getattr(samples, "first_media", lambda: None)() for samples in (self.run.data.train, self.run.data.eval))
        if all(place is None for place in held):
            return
        if "media" not in engine.capabilities:
            raise CapabilityError("dataset: its prompts have media, and this engine takes text only: use engine=transformers")
        if self.config.environment:
            raise RequestError("trainer.environment: talks take text only so far, and the prompts have media")

    def _flat(self, prepared: Sequence[Any]) -> bool:
        """Whether all models keep answers apart that are laid end to end."""
        if self.config.padding == "always":
            return False
        for steps in prepared:
            if lack := isolates(steps, self.run.template, self.run.data.train):
                self.run.events.note(f"padding the answers of a pass: {lack}")
                return False
        return True

    def _restored(self, steps: Any, folder: Path | None) -> State:
        """The state of a checkpoint, and of `steps`; a new one without a folder. Raises RequestError for a damaged file."""
        if folder is None:
            return State()
        steps.load(folder)
        try:
            return State(**json.loads((folder / "trainer.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as err:
            raise RequestError(
                f"checkpoint {folder} cannot be resumed: trainer.json: {' '.join(str(err).split())}. "
                "Name an earlier one: trainer.resume=FOLDER"
            ) from err

    # --- rewards ------------------------------------------------------------------------------------------------------

    def _score(self, made: Sequence[Sequence[Rollout]]) -> list[Group]:
        with self.stages.stage("rewards"):
            return self.scoring(made)

    def _told(self, groups: Sequence[Group]) -> list[ToldGroup]:
        """What all ranks know of all groups, in the order of their prompts. Collective."""
        told = [group for found in gathered([account.tell(group) for group in groups]) for group in found]
        return sorted(told, key=lambda group: group.number)

    def _evaluate_rewards(self, steps: Any, state: State) -> None:
        """The mean reward of one answer to each evaluation row, drawn as in training."""
        backend, held = self.run.backend, Prompts(self.run.data.eval, self.run.config.seed, shuffle=False)
        with self.stages.stage("sync"):
            self.weights.sync(steps, state.step)
        own = held.draw(share_of_rank(range(len(held)), backend.rank, backend.world))
        told = self._told(self._score(self.rollouts.make(own, 1)))
        found = account.figures(told, state.step)
        loss = -found["reward"]
        better = state.best_loss is None or loss < state.best_loss
        if better:
            state.best_loss, state.best_step = loss, state.step
        state.evals.append((state.step, loss))
        shown = ("reward", "reward_std", "length", "truncated")
        kept = {name: value for name, value in found.items() if name.split("/")[0] in shown}
        self.run.events.emit("eval", step=state.step, loss=loss, best=better, **kept)
        self.run.events.note(f"evaluation: reward {found['reward']:.4f} over {len(told)} rows")
        self.stages.take()  # a step's times are its own

    # --- telling ------------------------------------------------------------------------------------------------------

    def _times(self) -> dict[str, float]:
        """Seconds of each stage since the last call."""
        return {f"seconds/{name}": round(value, 3) for name, value in self.stages.take().items()}

    def _show_samples(self, state: State, groups: Sequence[Group]) -> None:
        """A few answers of the step as a table, in the log and the report."""
        if self.config.samples and self.run.backend.rank == 0 and groups:
            shown = {group.number: _asked(group) for group in groups}
            rows = account.sample_rows(groups, shown, self.config.samples)
            self.run.events.emit("table", title="Samples", step=state.step, columns=account.COLUMNS, rows=rows)

    def _metrics(self, state: State) -> dict[str, Any]:  # type: ignore[override]
        return {
            "steps": state.step,
            "updates": state.updates,
            "seconds": round(state.seconds, 3),
            "peak_bytes": self.run.backend.peak_bytes(),
            "train_loss": state.loss_sum / state.step if state.step else None,
            "eval_loss": state.evals[-1][1] if state.evals else None,
            "reward": state.reward,
            "eval_reward": -state.evals[-1][1] if state.evals else None,
            "best_step": state.best_step,
            "tokens": state.tokens,
            "trained_tokens": state.tokens,
            "tokens_per_second": round(state.tokens / state.seconds, 1) if state.seconds else None,
        }


def _asked(group: Group) -> str:
    messages = [message for message in group.answers[0].rollout.row["messages"] if message["role"] == "user"]
    return str(messages[-1].get("content")) if messages else ""
