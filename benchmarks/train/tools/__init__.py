"""What the benchmark knows of each tool: how to call it, where it leaves its adapter, how its log shows the steps.

One file a tool, each with one `TOOL`. The settings in it are the fastest documented ones that were found for a CPU with bf16;
the comment beside a setting says why it is so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.train.job import Job

HERE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Step:
    """A step that a line of the log says is done. loss: of that step, as the tool counts it."""

    number: int
    loss: float


@dataclass(frozen=True)
class Call:
    """How to start a tool: the words after its Python, and variables to set."""

    words: list[str]
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Tool:
    """name: as in the table. version: the one that is installed.

    train(job, out): the call that trains into the folder `out`; it may write files there first.
    adapter(out): the folder with adapter_model.safetensors after the run.
    begins(text): whether a line says that the first step begins.
    step(text, number): the step that a line says is done; number is the one expected next.
    prepare(job, out): the call that prepares the data and trains nothing; without it, `train` is stopped at that point.
    mend(venv): what has to be done after the installation.
    """

    name: str
    version: str
    train: Callable[[Job, Path], Call]
    adapter: Callable[[Path], Path]
    begins: Callable[[str], bool]
    step: Callable[[str, int], Step | None]
    prepare: Callable[[Job, Path], Call] | None = None
    mend: Callable[[Path], None] | None = None
    installed: str = ""  # the tool whose environment is used; empty is its own

    @property
    def environment(self) -> str:
        return self.installed or self.name

    @property
    def requirements(self) -> Path:
        return HERE / "requirements" / f"{self.environment}.txt"

    def varied(self, words: list[str]) -> Tool:
        """The same tool with more words on its command line, which override those before them."""

        def train(job: Job, out: Path) -> Call:
            call = self.train(job, out)
            return replace(call, words=[*call.words, *words])

        return replace(self, name=f"{self.name} {' '.join(words)}", train=train, installed=self.environment)


HF_BAR = re.compile(r"(?:^|\s)0/\d+ \[00:00<\?, \?it/s")
HF_LOSS = re.compile(r"\{'loss': '?(-?[\d.]+(?:e[+-]?\d+)?|nan|inf)'?[,}]")


def hf_begins(text: str) -> bool:
    """transformers' Trainer draws an empty progress bar, then begins. The last one before the first loss is the trainer's."""
    return bool(HF_BAR.search(text))


def hf_step(text: str, number: int) -> Step | None:
    """transformers' Trainer prints {'loss': ...} at each step where logging_steps is 1."""
    found = HF_LOSS.search(text)
    return Step(number, float(found[1])) if found else None
