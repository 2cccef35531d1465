"""Rollouts: what the model answers to a step's prompts, with the tokens, log-probabilities and weight version of the engine.

From any `Engine`. Token ids are the engine's own from beginning to end; what an environment says comes between them untrained.
Seeds are a pure function of the run's seed and the prompt's number, so a resumed run makes the same rollouts again.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from swift_core.errors import RunError, one_line
from swift_core.types import Completion, Engine, Request, Row, Sample, Template

from swift_plugin_grpo.environments import Environment, Factory, continuation, read_answer
from swift_plugin_grpo.prompts import Prompt, question
from swift_plugin_grpo.stages import Stages
from swift_plugin_grpo.weights import Weights


@dataclass(slots=True)
class Rollout:
    """One answer, or one talk of several turns. T tokens in `ids`, N of them the model's own."""

    prompt: int  # number of its prompt
    choice: int
    row: Row
    ids: list[int]  # [T]: the prompt, the answer, and in a talk what was said between
    own: list[bool]  # [T]: which of them the model made
    logprobs: list[float] = field(default_factory=list)  # [N]: the engine's, of its own tokens
    text: str = ""  # of the last answer, without special tokens
    messages: list[Row] = field(default_factory=list)  # after the prompt, in a talk
    finish: str = ""  # "stop" or "length": cut short
    version: int = 0  # of the weights that made it
    turns: int = 0
    reward: float | None = None  # sum of an environment's rewards
    prompt_tokens: int = 0
    last_ids: list[int] = field(default_factory=list)  # of the last answer
    asked: str = ""  # of a prompt with media its text, whose places for them are filled in `ids`
    media: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """The model's own tokens."""
        return len(self.logprobs)

    @property
    def truncated(self) -> bool:
        return self.finish == "length"

    def sample(self) -> Sample:
        """As a sample whose trained tokens are the model's own, in the order of `logprobs`."""
        weights, where = [float(own) for own in self.own], f"prompt {self.prompt}"
        return Sample(list(self.ids), weights, where=where, text=self.asked, media=self.media)

    def told(self) -> Row:
        """The row as rewards get it: with how the answer came about under `rollout`."""
        return {
            **self.row,
            "rollout": {"messages": self.messages, "tokens": self.length, "finish": self.finish, "turns": self.turns},
        }


NEVER = -100.0
"""What is added to the logit of a token that is not to be drawn: OpenAI's lowest bias."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. `max_tokens` counts all own tokens of a rollout."""

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    unsaid: tuple[int, ...] = ()  # tokens that are never drawn: those that stand for media

    def request(self, seed: int, left: int, count: int, adapter: str | None, **asked: Any) -> Request:
        """asked: the prompt, as fields of a `Request`."""
        return Request(
            max_tokens=left, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, min_p=self.min_p,
            repetition_penalty=self.repetition_penalty, stop=list(self.stop), seed=seed, n=count, adapter=adapter,
            logit_bias=dict.fromkeys(self.unsaid, NEVER), **asked,
        )  # fmt: skip


def seed_of(*parts: object) -> int:
    """A request's seed, below 2**31."""
    return int.from_bytes(hashlib.sha256("-".join(map(str, parts)).encode()).digest()[:4], "big") >> 1


class Rollouts:
    """Makes groups of rollouts, one group a prompt. `weights` says which version the engine answers with."""

    def __init__(
        self,
        engine: Engine,
        template: Template,
        weights: Weights,
        sampling: Sampling,
        seed: int,
        stages: Stages,
        environment: Factory | None = None,
        turns: int = 1,
    ) -> None:
        self.engine, self.template, self.weights, self.sampling, self.seed = engine, template, weights, sampling, seed
        self.stages, self.environment, self.turns = stages, environment, turns

    def make(self, prompts: Sequence[Prompt], count: int) -> list[list[Rollout]]:
        """`count` rollouts for each prompt, in their order. Raises RunError where the engine leaves one out."""
        version, adapter = self.weights.version, self.weights.adapter
        if not prompts:
            return []
        if self.environment is not None:
            return self._talks(prompts, count, version, adapter)
        requests = [
            self.sampling.request(seed_of(self.seed, prompt.number), self.sampling.max_tokens, count, adapter, **asked(prompt))
            for prompt in prompts
        ]
        found = self._generate(requests)
        groups = []
        for index, prompt in enumerate(prompts):
            group = []
            for choice in range(count):
                rollout = begin(prompt, choice)
                check_prompt(prompt, found[index, choice])
                add(rollout, found[index, choice], self._version(found[index, choice], version))
                group.append(rollout)
            groups.append(group)
        return groups

    def _generate(self, requests: Sequence[Request]) -> dict[tuple[int, int], Completion]:
        with self.stages.stage("rollouts"):
            found = {(answer.index, answer.choice): answer for answer in self.engine.generate(requests)}
        lacking = [(n, c) for n, request in enumerate(requests) for c in range(request.n) if (n, c) not in found]
        if lacking:
            raise RunError(f"the engine gave {len(found)} answers and left {len(lacking)} out, that of request {lacking[0][0]}")
        return found

    def _version(self, answer: Completion, version: int) -> int:
        return answer.weight_version if "sync" in self.engine.capabilities and not self.weights.by_adapter else version

    def _talks(self, prompts: Sequence[Prompt], count: int, version: int, adapter: str | None) -> list[list[Rollout]]:
        """Rollouts of several turns: all that go on answer together, then their environments do."""
        assert self.environment is not None
        groups = [[begin(prompt, choice) for choice in range(count)] for prompt in prompts]
        open_: list[tuple[Rollout, Environment]] = []
        for rollout in (rollout for group in groups for rollout in group):
            world = self._told("reset", rollout, self.environment)
            if more := self._told("reset", rollout, lambda world=world, rollout=rollout: messages_of(world.reset(rollout.row))):
                self._say(rollout, more, first=True)
            rollout.reward = 0.0
            open_.append((rollout, world))
        for turn in range(self.turns):
            if not open_:
                break
            requests = [
                self.sampling.request(
                    seed_of(self.seed, rollout.prompt, rollout.choice, turn), self.sampling.max_tokens - rollout.length, 1,
                    adapter, token_ids=rollout.ids,
                )
                for rollout, _ in open_
            ]  # fmt: skip
            found = self._generate(requests)
            going = []
            for n, (rollout, world) in enumerate(open_):
                before = list(rollout.ids)
                add(rollout, found[n, 0], self._version(found[n, 0], version))
                message = read_answer(self.template, before, found[n, 0].token_ids, rollout.text, rollout.row.get("tools"))
                rollout.messages.append(message)
                said, reward, done = self._told("step", rollout, lambda world=world, message=message: step(world, message))
                rollout.reward = (rollout.reward or 0.0) + reward
                if done or rollout.truncated:
                    continue
                if turn + 1 == self.turns or rollout.length >= self.sampling.max_tokens:
                    rollout.finish = "length"  # it was not over
                    continue
                self._say(rollout, said)
                going.append((rollout, world))
            open_ = going
        return groups

    def _told(self, name: str, rollout: Rollout, call: Any) -> Any:
        what = f"({name} of prompt {rollout.prompt}, answer {rollout.choice})"
        with self.stages.stage("environment", what):
            try:
                return call()
            except RunError:
                raise
            except Exception as err:
                raise RunError(f"the environment failed {what}: {one_line(err)}") from err

    def _say(self, rollout: Rollout, messages: list[Row], first: bool = False) -> None:
        """Add what an environment says. Before the first answer the prompt is rendered anew, with the messages at its end."""
        tools, kwargs = rollout.row.get("tools"), dict(rollout.row.get("chat_template_kwargs") or {})
        if first:
            rollout.ids = list(self.template.prompt([*question(rollout.row), *messages], tools, **kwargs))
            rollout.own, rollout.prompt_tokens = [False] * len(rollout.ids), len(rollout.ids)
        else:
            ended = rollout.ids[-1] in self.template.stop_ids()
            more = continuation(self.template, rollout.messages[-1], messages, tools, ended, kwargs)
            rollout.ids += more
            rollout.own += [False] * len(more)
        rollout.messages += messages


def step(world: Environment, message: Row) -> tuple[list[Row], float, bool]:
    """What an environment answers to a message. Raises ValueError for what is not messages, a finite reward and an end."""
    found = world.step(message)
    if not isinstance(found, tuple | list) or len(found) != 3:
        raise ValueError(f"step must give (messages, reward, done), not {found!r}")
    said, reward, done = found
    reward = float(reward)
    if not math.isfinite(reward):
        raise ValueError(f"a reward must be a finite number, not {reward}")
    return messages_of(said), reward, bool(done)


def messages_of(said: Any) -> list[Row]:
    """What an environment says, as a list. Raises ValueError for what is no list of messages."""
    if said is None:
        return []
    if isinstance(said, tuple | list) and all(isinstance(message, dict) and "role" in message for message in said):
        return list(said)
    raise ValueError(f'expected a list of messages such as {{"role": "user", "content": "..."}}, not {said!r}')


def begin(prompt: Prompt, choice: int) -> Rollout:
    """A rollout before its first answer."""
    own, size = [False] * len(prompt.ids), len(prompt.ids)
    return Rollout(
        prompt.number, choice, prompt.row, list(prompt.ids), own, prompt_tokens=size, asked=prompt.text, media=prompt.media
    )


def asked(prompt: Prompt) -> dict[str, Any]:
    """A prompt as fields of a `Request`: its ids, or with media the messages that have places for them."""
    if not prompt.media:
        return {"token_ids": prompt.ids}
    row, kwargs = prompt.row, dict(prompt.row.get("chat_template_kwargs") or {})
    return {"messages": question(row), "tools": row.get("tools"), "media": prompt.media, "template_kwargs": kwargs}


def check_prompt(prompt: Prompt, answer: Completion) -> None:
    """Raises RunError where the engine read other media than the trainer does."""
    if prompt.media and answer.prompt_tokens != len(prompt.ids):
        raise RunError(
            f"the engine read {answer.prompt_tokens} tokens of prompt {prompt.number}, and the trainer reads {len(prompt.ids)}"
        )


def add(rollout: Rollout, answer: Completion, version: int) -> None:
    """Add an answer's tokens. Raises RunError where the engine does not tell each one's log-probability."""
    if len(answer.logprobs) != len(answer.token_ids):
        raise RunError(
            f"the engine gave {len(answer.token_ids)} tokens and {len(answer.logprobs)} log-probabilities: rollouts need both"
        )
    rollout.ids += answer.token_ids
    rollout.own += [True] * len(answer.token_ids)
    rollout.logprobs += answer.logprobs
    rollout.text, rollout.finish, rollout.version = answer.text, answer.finish or "", version
    rollout.last_ids = list(answer.token_ids)
    rollout.turns += 1
