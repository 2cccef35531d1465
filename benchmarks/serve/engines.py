"""Tokens a second of engines on the same prompts, by default 16 of 64 new tokens each, on two threads, in turns, and a table.

    .venv/bin/python -m benchmarks.serve.engines                    all engines that are installed, fp32 and bf16
    .venv/bin/python -m benchmarks.serve.engines --engines generate,transformers,openvino --precisions bf16 --rounds 5
    .venv/bin/python -m benchmarks.serve.engines --prompts 48 --tokens 16-256    answers of mixed lengths

Each engine and precision is a process of its own, started, warmed up, and then asked for all answers once a round, in turn:
while one computes the others are stopped (SIGSTOP). Greedy, no end before the tokens asked for. Median and best of the rounds;
memory is the largest sum of resident pages of all its processes. `generate` is plain `transformers.generate` in batches of 16;
`ms-swift`, in batches of 16 too, runs in its own environment (`benchmarks.train.run --setup`), where that is made. Engines of
ours tell each token's log-probability, which `generate` does not; `openvino+nologprobs` does without.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("engine_worker.py")
ENGINES = ("generate", "transformers", "vllm", "openvino", "openvino+nologprobs", "llamacpp", "ms-swift")
QUIET = 0.5  # load above which figures are not worth taking


def cache() -> Path:
    base = os.environ.get("SWIFT_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swift-core"


def python_of(engine: str) -> Path | None:
    """The interpreter of an engine's process; None where the engine is not installed."""
    if engine == "ms-swift":
        found = Path(os.environ.get("SWIFT_BENCH") or cache() / "bench") / "ms-swift" / "bin" / "python"
        return found if found.exists() else None
    own = engine.partition("+")[0]
    if own in ("vllm", "openvino", "llamacpp") and not (cache() / "engines" / own / "installed.json").exists():
        return None
    return Path(sys.executable)


@dataclass
class Contestant:
    """One engine in one precision, in a process of its own."""

    engine: str
    precision: str
    process: subprocess.Popen[str]
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    start: float = 0.0  # seconds from start to ready
    peak: int = 0  # bytes
    failed: str = ""

    def pids(self) -> list[int]:
        return [self.process.pid, *descendants(self.process.pid)]

    def signal(self, how: signal.Signals) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, how)

    def ask(self, what: str, limit: float) -> dict[str, Any]:
        """Send a word, and read the line that answers it, watching memory. Raises RuntimeError with why there is none."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        until = time.monotonic() + limit
        while time.monotonic() < until:
            self.peak = max(self.peak, sum(map(resident, self.pids())))
            if select.select([self.process.stdout], [], [], 0.25)[0]:
                line = self.process.stdout.readline()
                if not line:
                    raise RuntimeError(f"it ended with exit code {self.process.wait()}")
                if line.startswith("{"):
                    answer: dict[str, Any] = json.loads(line)
                    if "error" in answer:
                        raise RuntimeError(answer["error"])
                    return answer
        raise RuntimeError(f"no answer in {limit:.0f} seconds")


def descendants(pid: int) -> Iterator[int]:
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(word) for word in tasks.read_text().split()]
        except OSError:
            continue
        for child in children:
            yield child
            yield from descendants(child)


def resident(pid: int) -> int:
    """Bytes of a process in memory, shared pages by their share."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def embedded_folder() -> str:
    """The folder of swift-core's default model, made if need be."""
    words = [sys.executable, "-m", "swift_core.cli.main", "models", "show", "smollm2-135m-instruct", "--json"]
    return str(json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)["folder"])


def begin(engine: str, precision: str, python: Path, args: argparse.Namespace, log: Path) -> Contestant:
    settings = {
        "engine": engine, "precision": precision, "threads": args.threads, "prompts": args.prompts, "tokens": args.tokens,
        "model": args.model, "folder": args.model or embedded_folder(),
    }  # fmt: skip
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env |= {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        [str(python), str(WORKER), json.dumps(settings)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True,
        stderr=(log / f"{engine}-{precision}.log").open("w"), cwd=REPOSITORY,
    )  # fmt: skip
    return Contestant(engine, precision, process)


def measure(contestants: list[Contestant], rounds: int, limit: float) -> None:
    """Ready each in turn, then one batch of each a round, the others stopped."""
    for one in contestants:
        started = time.monotonic()
        try:
            one.ask("ready", limit)
            one.start = time.monotonic() - started
            one.ask("run", limit)  # warm up
        except (RuntimeError, OSError) as err:
            one.failed = str(err)
        one.signal(signal.SIGSTOP)
    for number in range(rounds):
        for one in contestants:
            if one.failed:
                continue
            one.signal(signal.SIGCONT)
            try:
                answer = one.ask("run", limit)
                one.seconds.append(answer["seconds"])
                one.tokens = answer["tokens"]
                print(f"round {number + 1}, {one.engine} {one.precision}: {answer['tokens'] / answer['seconds']:.0f} tokens/s")
            except (RuntimeError, OSError) as err:
                one.failed = str(err)
            one.signal(signal.SIGSTOP)


def table(contestants: list[Contestant]) -> str:
    lines = [
        "| engine | precision | tokens/s, median | best | x generate | peak memory, MB | start, s |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    rates = {(c.engine, c.precision): c.tokens / statistics.median(c.seconds) for c in contestants if c.seconds}
    for one in contestants:
        if not one.seconds:
            lines.append(f"| {one.engine} | {one.precision} | {one.failed or 'not run'} | | | | |")
            continue
        rate, plain = rates[one.engine, one.precision], rates.get(("generate", one.precision))
        times = f"{rate / plain:.2f}" if plain else ""
        best = one.tokens / min(one.seconds)
        lines.append(
            f"| {one.engine} | {one.precision} | {rate:.0f} | {best:.0f} | {times} | {one.peak / 1e6:,.0f} | {one.start:.0f} |"
        )
    return "\n".join(lines)


def span(text: str) -> tuple[int, int]:
    least, _, most = text.partition("-")
    return int(least), int(most or least)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engines", default=",".join(ENGINES), help="[%(default)s]")
    parser.add_argument("--precisions", default="fp32,bf16", help="[%(default)s]; llamacpp runs its file's own, once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=16, help="at most 50 [%(default)s]")
    parser.add_argument("--tokens", type=span, default=(64, 64), help="new tokens of each answer: 64, or 16-256 at random [64]")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one start or one batch [%(default)s]")
    parser.add_argument("--model", help="a checkpoint's folder [the embedded model]")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "runs" / "bench-engines", help="logs and results.json")
    args = parser.parse_args()
    wanted, precisions = args.engines.split(","), args.precisions.split(",")
    if unknown := [name for name in wanted if name not in ENGINES]:
        parser.error(f"--engines: unknown {', '.join(unknown)}; known: {', '.join(ENGINES)}")
    if not 1 <= args.prompts <= 50:
        parser.error(f"--prompts: {args.prompts} is not from 1 to 50")
    if (load := os.getloadavg()[0]) > QUIET:
        print(f"the machine is busy (load {load:.1f}): do not quote these figures", file=sys.stderr)
    args.output.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # then the stopped ones are ended too
    contestants = []
    for precision in precisions:
        for engine in wanted:
            python = python_of(engine)
            if python is None:
                print(f"{engine} is not installed: left out", file=sys.stderr)
            elif engine != "llamacpp" or precision == precisions[0]:
                own = "file's" if engine == "llamacpp" else precision
                contestants.append(begin(engine, own, python, args, args.output))
    try:
        measure(contestants, args.rounds, args.limit)
    finally:
        for one in contestants:
            one.signal(signal.SIGCONT)
            if one.process.stdin:
                one.process.stdin.close()
        for one in contestants:
            try:
                one.process.wait(20)
            except subprocess.TimeoutExpired:
                one.signal(signal.SIGKILL)
    text = table(contestants)
    print(text)
    kept = ("engine", "precision", "seconds", "tokens", "peak", "start", "failed")
    found = [{name: getattr(one, name) for name in kept} for one in contestants]
    (args.output / "results.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    (args.output / "table.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
