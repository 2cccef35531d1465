"""How fast each tool prepares data, and in how much memory: synthetic rows, rendered, tokenized and masked, nothing trained.

    .venv/bin/python -m benchmarks.train.prepare --data FILE [--rows 20000] [--workers N]

Each tool prepares a few rows, then all. The difference of the rows, over the difference of the times, is the rate: starting,
importing and loading the model drop out of it. The peers have no call that only prepares, so their own training command
is stopped at Trainer.train (inside/record_batches.py); swift-core has `train --dry-run`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.train.environments import REPOSITORY, TOOLS, environ, python_of
from benchmarks.train.job import Job, read_rows, synthetic_rows, write_rows
from benchmarks.train.measure import Measured, run
from benchmarks.train.results import MIB
from benchmarks.train.run import INSIDE, embedded_model, fresh, write_json
from benchmarks.train.tools import Tool


@dataclass(frozen=True)
class Prepared:
    """One tool's preparation of `rows` rows; `few` and `few_seconds` are of the small run that is subtracted."""

    tool: str
    rows: int
    seconds: float
    peak_bytes: int
    few: int
    few_seconds: float
    few_peak_bytes: int

    @property
    def rate(self) -> float | None:
        """Rows a second; None where the large run was no slower, and the rows were too few to tell."""
        more = self.seconds - self.few_seconds
        return (self.rows - self.few) / more if more > 0 else None

    @property
    def rate_text(self) -> str:
        return "-" if self.rate is None else f"{self.rate:,.0f}"


def prepare(tool: Tool, job: Job, folder: Path) -> Measured:
    """Prepare the job's rows once, with empty caches. Raises RuntimeError where the tool fails."""
    out = fresh(folder)
    call = tool.prepare(job, out / "run") if tool.prepare else tool.train(job, out / "run")
    words = call.words if tool.prepare else [str(INSIDE / "record_batches.py"), "-", *call.words[1:]]
    scratch = out / "caches"
    measured = run([str(python_of(tool)), *words], out / "log.txt", environ(tool, scratch, job.threads, call.env), out)
    shutil.rmtree(scratch, ignore_errors=True)
    if measured.status:
        raise RuntimeError(f"{tool.name}: preparing failed with status {measured.status}; see {out / 'log.txt'}")
    return measured


def table(found: list[Prepared]) -> str:
    lines = [
        "| tool | rows a second | all rows, from the command, s | peak MiB | peak MiB with few rows |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {one.tool} | {one.rate_text} | {one.seconds:.1f} | {one.peak_bytes / MIB:,.0f} | {one.few_peak_bytes / MIB:,.0f} |"
        for one in found
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="an Alpaca file that the synthetic rows draw words from")
    parser.add_argument("--rows", type=int, default=20_000, help="[%(default)s]")
    parser.add_argument("--few", type=int, default=200, help="rows of the run that is subtracted [%(default)s]")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes that prepare, where a tool has the option"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--output", type=Path, default=REPOSITORY / "runs" / "bench-prepare")
    args = parser.parse_args()
    folder = args.output.resolve()
    rows = synthetic_rows(args.rows, read_rows(args.data))
    whole = Job(embedded_model(), write_rows(rows, folder / "all.jsonl"), threads=args.threads, workers=args.workers)
    small = replace(whole, train=write_rows(rows[: args.few], folder / "few.jsonl"))
    found = []
    for name in args.tools.split(","):
        few, many = (prepare(TOOLS[name], job, folder / f"{name}-{kind}") for job, kind in ((small, "few"), (whole, "all")))
        one = Prepared(name, args.rows, many.seconds, many.peak_bytes, args.few, few.seconds, few.peak_bytes)
        print(
            f"{name}: {one.rate_text} rows a second, {one.seconds:.1f} s in all, peak {one.peak_bytes / MIB:,.0f} MiB",
            flush=True,
        )
        found.append(one)
    text = table(found)
    print(f"\n{text}")
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    write_json(folder / "results.json", [{**one.__dict__, "rate": one.rate} for one in found])


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, FileNotFoundError, ValueError) as err:
        sys.exit(f"error: {err}")
