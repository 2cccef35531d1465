"""Rollouts one step ahead: made by an engine in another process while this one trains."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from swift_plugin_grpo.prompts import Prompt
from swift_plugin_grpo.rollouts import Rollout
from swift_plugin_grpo.stages import Stages

Made = list[list[Rollout]]


class Ahead:
    """At most one batch of rollouts in the making, in a thread that ends with the process."""

    def __init__(self, stages: Stages) -> None:
        self.stages = stages
        self._numbers: list[int] | None = None
        self._done = threading.Event()
        self._found: tuple[Made | None, BaseException | None] = (None, None)

    @property
    def waits(self) -> bool:
        """Whether rollouts were begun and not yet taken."""
        return self._numbers is not None

    def begin(self, prompts: Sequence[Prompt], make: Callable[[], Made]) -> None:
        self._numbers = [prompt.number for prompt in prompts]
        done = self._done = threading.Event()

        def work() -> None:
            try:
                self._found = make(), None
            except BaseException as err:  # told by who takes it
                self._found = None, err
            done.set()

        threading.Thread(target=work, name="swift-rollouts", daemon=True).start()

    def wait(self) -> None:
        """Until what was begun is there."""
        with self.stages.stage("rollouts", "(begun a step ago)"):
            while not self._done.wait(0.2):  # in parts, so that a signal is heard
                pass

    def take(self, prompts: Sequence[Prompt], make: Callable[[], Made]) -> Any:
        """What was begun for these prompts, else made now. Raises what making them raised."""
        if self._numbers != [prompt.number for prompt in prompts]:
            return make()
        self.wait()
        self._numbers = None
        made, err = self._found
        if err is not None:
            raise err
        return made
