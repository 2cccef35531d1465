"""The reward `accuracy`: mathematical equality by math-verify, in a process of its own.

The library limits its time by signals, which work in a main thread only, and computer algebra may hang all the same. So a
process of its own compares, and is ended where it does not answer.
"""

from __future__ import annotations

import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from typing import Any

from swift_core.errors import RunError
from swift_core.types import Row

from swift_plugin_rewards.answer import raw_of
from swift_plugin_rewards.asking import reference_of
from swift_plugin_rewards.config import AccuracyConfig

START_SECONDS = 60  # for the library to be imported
TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


class Accuracy:
    """1 or 0; None for a row without a right answer, or with one that is no mathematics, unless `text` is set."""

    waits = True

    def __init__(self, config: AccuracyConfig) -> None:
        self.config, self.worker = config, Worker()

    def __call__(self, completions: list[str], rows: list[Row]) -> list[float | None]:
        golds = [reference_of(row, self.config.reference) for row in rows]
        asked = [
            {"gold": gold, "said": final(said), "boxed": self.config.boxed}
            for gold, said in zip(golds, completions, strict=True) if gold is not None
        ]  # fmt: skip
        found = iter(self.worker.ask(asked, self.config.timeout))
        results: list[float | None] = []
        for gold, said in zip(golds, completions, strict=True):
            value = None if gold is None else next(found)
            if gold is not None and value is None and self.config.text:
                value = float(plain(gold) == plain(final(said)))
            results.append(value)
        return results

    def close(self) -> None:
        self.worker.close()


def final(said: str) -> str:
    """What an answer says in the end: what stands after its reasoning, and there between answer tags where there are any."""
    text = raw_of(said).rpartition("</think>")[2]
    tagged = TAGGED.findall(text)
    return tagged[-1].strip() if tagged else text.strip()


def plain(text: str) -> str:
    return " ".join(text.strip().strip(".,;:!?\"'`*()[]").lower().split())


class Worker:
    """A process of `math_worker`, started at the first question and again after one that it did not answer."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.answers: queue.Queue[str | None] = queue.Queue()
        self.errors: Any = None  # what the process writes on standard error
        self.lock = threading.Lock()

    def ask(self, questions: list[dict[str, Any]], timeout: float) -> list[float | None]:
        """For each `{"gold", "said", "boxed"}` 1, 0, or None where gold is no mathematics. One that takes longer is 0."""
        with self.lock:
            return [self._one(question, timeout) for question in questions]

    def _one(self, question: dict[str, Any], timeout: float) -> float | None:
        process = self._running()
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps({**question, "timeout": max(1, int(timeout / 2))}) + "\n")
            process.stdin.flush()
            line = self.answers.get(timeout=timeout)
        except (queue.Empty, OSError):
            self._end()
            return 0.0
        if line is None:  # its process died of the question
            self._end()
            return 0.0
        value: float | None = json.loads(line)
        return value

    def _running(self) -> subprocess.Popen[str]:
        if self.process is None:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self.answers, self.errors = queue.Queue(), tempfile.TemporaryFile("w+")  # noqa: SIM115 - a pipe would fill
            self.process = subprocess.Popen(
                [sys.executable, "-m", "swift_plugin_rewards.math_worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=self.errors, text=True, env=environment, start_new_session=True,
            )  # fmt: skip
            threading.Thread(target=self._read, args=(self.process, self.answers), daemon=True).start()
            try:
                ready = self.answers.get(timeout=START_SECONDS)
            except queue.Empty:
                ready = None
            if ready is None:
                self.errors.seek(0)
                error = self.errors.read() or "no answer"
                self._end()
                raise RunError(f"reward accuracy: math-verify did not start: {' '.join(error.split())[-300:]}")
        return self.process

    @staticmethod
    def _read(process: subprocess.Popen[str], answers: queue.Queue[str | None]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            answers.put(line)
        process.wait()
        answers.put(None)

    def _end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            assert self.process.stdin is not None
            with suppress(OSError):
                self.process.stdin.close()
            self.errors.close()
            self.process = None

    def close(self) -> None:
        with self.lock:
            self._end()
