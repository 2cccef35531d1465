"""How swift-core's step grows with the length: one sequence a step, 256 to 8,192 tokens.

    .venv/bin/python -m benchmarks.train.length [--lengths 256,512,...] [--steps 4]

A run for each length; the first step, which allocates, is left out, and the median of the others taken. The last column is
the exponent between a length and the one before: 1 is linear, 2 is quadratic.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.train.environments import REPOSITORY, environ, python_of
from benchmarks.train.job import Job, row_of_words, write_rows
from benchmarks.train.measure import run
from benchmarks.train.run import embedded_model, fresh, write_json
from benchmarks.train.tools.swift_core import TOOL, inspect, train


@dataclass(frozen=True)
class Length:
    """tokens: of the sequence, counted by swift-core. seconds: a step, median. peak_bytes: of the whole run."""

    tokens: int
    seconds: float
    peak_bytes: int


def tokens_around(job: Job, folder: Path) -> int:
    """Tokens of a row beside those of its words: the template's."""
    file = write_rows([row_of_words(100)], folder / "probe.jsonl")
    call = inspect(Job(job.model, file))
    run([str(python_of(TOOL)), *call.words], folder / "probe.txt", environ(TOOL, folder / "caches", job.threads), folder)
    found = re.search(r'"tokens": ?(\d+)', (folder / "probe.txt").read_text(encoding="utf-8"))
    if not found:
        raise RuntimeError(f"swift-core inspect did not print the tokens; see {folder / 'probe.txt'}")
    return int(found[1]) - 100


def measure(job: Job, tokens: int, around: int, steps: int, folder: Path) -> Length:
    out = fresh(folder / f"{tokens}")
    file = write_rows([row_of_words(tokens - around)] * steps, out / "rows.jsonl")
    call = train(Job(job.model, file, batch=1, max_length=tokens, threads=job.threads), out / "run")
    measured = run(
        [str(python_of(TOOL)), *call.words], out / "log.txt", environ(TOOL, out / "caches", job.threads, call.env), out
    )
    log = out / "run" / "log.jsonl"
    if measured.status or not log.exists():
        raise RuntimeError(f"swift-core failed at length {tokens} with status {measured.status}; see {out / 'log.txt'}")
    events = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    done = [event for event in events if event["event"] == "step"]
    gaps = [later["time"] - earlier["time"] for earlier, later in itertools.pairwise(done)]
    return Length(int(done[-1]["tokens"]), statistics.median(gaps), measured.peak_bytes)


def table(found: list[Length]) -> str:
    lines = ["| tokens | seconds a step | tokens a second | peak MiB | exponent |", "|---:|---:|---:|---:|---:|"]
    for n, one in enumerate(found):
        before = found[n - 1] if n else None
        growth = f"{math.log(one.seconds / before.seconds) / math.log(one.tokens / before.tokens):.2f}" if before else ""
        rate = one.tokens / one.seconds
        lines.append(f"| {one.tokens:,} | {one.seconds:.2f} | {rate:.0f} | {one.peak_bytes / 2**20:,.0f} | {growth} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", default="256,512,1024,2048,4096,8192", help="[%(default)s]")
    parser.add_argument("--steps", type=int, default=4, help="a length; at least 2 [%(default)s]")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "runs" / "bench-length")
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps: at least 2, the first is left out")
    folder = args.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    job = Job(embedded_model(), folder, threads=args.threads)
    around = tokens_around(job, folder)
    found = []
    for tokens in map(int, args.lengths.split(",")):
        one = measure(job, tokens, around, args.steps, folder)
        print(f"{one.tokens:,} tokens: {one.seconds:.2f} s a step, peak {one.peak_bytes / 2**20:,.0f} MiB", flush=True)
        found.append(one)
    text = table(found)
    print(f"\n{text}")
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    write_json(folder / "results.json", [asdict(one) for one in found])


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, FileNotFoundError, ValueError) as err:
        sys.exit(f"error: {err}")
