"""The model's own answers to the prompts of rows, from the run's engine, as samples to learn on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from swift_core.errors import RequestError
from swift_core.types import Run, Sample
from swift_plugin_grpo.config import TIMEOUT
from swift_plugin_grpo.prompts import Prompt
from swift_plugin_grpo.rollouts import Rollouts, Sampling, seed_of
from swift_plugin_grpo.stages import Stages
from swift_plugin_grpo.weights import Weights

from swift_plugin_distill.rows import is_prompt, prompt_of


class Answers:
    """Answers with the weights of a step. Which rows are answered, and how they are drawn, is a pure function of seed, step and
    row: a resumed run, or one of more processes, does the same."""

    def __init__(self, run: Run, tuned: Any) -> None:
        config = run.trainer_config
        self.seed, self.share = run.config.seed, config.on_policy
        self.stages = Stages(config.timeouts, TIMEOUT, "trainer.timeouts")
        engine = run.engine()
        self.weights = Weights(engine, tuned)
        sampling = Sampling(config.max_tokens, config.sampling_temperature, config.top_p)
        self.rollouts = Rollouts(engine, run.template, self.weights, sampling, self.seed, self.stages)
        self.lengths: list[int] = []
        self.empty = 0

    def make(self, steps: Any, samples: Sequence[Sample], step: int, drawn: int | None = None) -> list[Sample]:
        """An answer to each sample's prompt, as a sample; without those of no token. Collective: every rank calls it.

        step: of the weights. drawn: what the answers are drawn by, where it is not the step.
        """
        with self.stages.stage("sync"):
            self.weights.sync(steps, step)
        prompts = [self._prompt(sample, step if drawn is None else drawn) for sample in samples]
        made = []
        for sample, (rollout,) in zip(samples, self.rollouts.make(prompts, 1), strict=True):
            if not rollout.length:
                self.empty += 1
                continue
            self.lengths.append(rollout.length)
            answer = rollout.sample()
            answer.row, answer.where = sample.row, sample.where
            made.append(answer)
        return made

    def _prompt(self, sample: Sample, step: int) -> Prompt:
        if sample.media:
            raise RequestError(
                f"{sample.where or f'row {sample.row}'} has media, which the model's own answers do not take so far: set "
                "trainer.on_policy=0"
            )
        ids = prompt_of(sample)
        return Prompt(seed_of(step, sample.row, len(ids)), ids, {})

    def close(self) -> None:
        self.weights.close()


def chosen(sample: Sample, seed: int, step: int, share: float) -> bool:
    """Whether a row is answered by the model in this step: with a chance of `share`, and always where it has no answer. Never
    where nothing is left of its prompt, as max_length cut it."""
    if is_prompt(sample):
        return True
    return random.Random(f"{seed}-gkd-{step}-{sample.row}").random() < share and bool(prompt_of(sample))
