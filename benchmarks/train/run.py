"""The same training job with swift-core and with each peer, interleaved, and a table of what it took.

    .venv/bin/python -m benchmarks.train.run --setup                    make the peers' environments (once)
    .venv/bin/python -m benchmarks.train.run --data FILE                check, train, judge, print the table
    .venv/bin/python -m benchmarks.train.run --data FILE --check        only compare what each tool would train

Everything is written below --output: each run's log and adapter, checks, results.json and table.md. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.train import environments, results
from benchmarks.train.environments import REPOSITORY, TOOLS, environ, python_of
from benchmarks.train.job import Job, read_rows, write_rows
from benchmarks.train.measure import run
from benchmarks.train.results import Counts, Result
from benchmarks.train.tools import Tool
from benchmarks.train.tools.swift_core import inspect

INSIDE = Path(__file__).resolve().parent / "inside"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setup", action="store_true", help="make the environments and stop")
    parser.add_argument("--check", action="store_true", help="compare what each tool would train, train nothing")
    parser.add_argument("--no-check", dest="checked", action="store_false", help="skip the check before the runs")
    parser.add_argument("--tools", default=",".join(TOOLS), help="names, in the order of the first round [%(default)s]")
    parser.add_argument("--data", type=Path, help="an Alpaca .json or .jsonl file, or one with messages")
    parser.add_argument("--rows", type=int, default=256, help="rows trained, from the file's start [%(default)s]")
    parser.add_argument("--held", type=int, default=64, help="held-out rows, those that follow [%(default)s]")
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="WORDS",
        help="one more, a tool and words that override its settings: 'trl --dtype float32'",
    )
    parser.add_argument("--rounds", type=int, default=1, help="runs of each tool; medians are printed [%(default)s]")
    parser.add_argument("--limit", type=int, help="steps at most, for a trial")
    parser.add_argument("--model", type=Path, help="a checkpoint's folder [the embedded model]")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="OMP_NUM_THREADS of all tools [%(default)s]")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "runs" / "bench-train", help="[%(default)s]")
    args = parser.parse_args()
    named = [*filter(None, args.tools.split(",")), *(words.split()[0] for words in args.also)]
    if unknown := [name for name in named if name not in TOOLS]:
        parser.error(f"--tools, --also: unknown {', '.join(unknown)}; known: {', '.join(TOOLS)}")
    if not args.setup and args.data is None:
        parser.error("--data FILE is needed: an Alpaca .json or .jsonl file")
    return args


def chosen(args: argparse.Namespace) -> list[Tool]:
    """The tools of --tools, then the variants of --also."""
    variants = [words.split() for words in args.also]
    return [*(TOOLS[name] for name in args.tools.split(",") if name), *(TOOLS[name].varied(words) for name, *words in variants)]


def folder_of(tool: str, number: int | None = None) -> str:
    """A name for a run's folder."""
    return re.sub(r"[^\w.=]+-*", "-", tool) + ("" if number is None else f"-{number}")


def embedded_model() -> Path:
    """The folder of swift-core's default model, made if need be."""
    words = ["-c", "from swift_core.cli.main import main; main()", "models", "show", "smollm2-135m-instruct", "--json"]
    done = subprocess.run([str(python_of(TOOLS["swift-core"])), *words], capture_output=True, text=True, check=True)
    return Path(json.loads(done.stdout)["folder"])


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def judge_python() -> str:
    """The interpreter of the judge and the reference: transformers and peft, as swift-core's environment has them."""
    return str(python_of(TOOLS["swift-core"]))


def inside(script: str, *words: str | Path) -> None:
    """Run one of the scripts in inside/ with the judge's interpreter. Raises CalledProcessError."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([judge_python(), str(INSIDE / script), *map(str, words)], check=True, env=env, stderr=subprocess.DEVNULL)


def recorded(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def record(tool: Tool, job: Job, folder: Path) -> list[dict[str, Any]]:
    """What the tool would train: its rows' ids and labels. Raises RuntimeError where it does not get that far."""
    name = folder_of(tool.name)
    out, file = fresh(folder / name), folder / f"{name}.jsonl"
    ours = tool.environment == "swift-core"
    if ours:
        call, file = inspect(job), folder / f"{name}-inspected.jsonl"
        words = call.words
    else:
        call = tool.train(job, out / "run")
        module = call.words[1:] if call.words[0] == "-m" else call.words
        words = [str(INSIDE / "record_batches.py"), str(file), *module]
    log = out / "log.txt"
    done = run([str(python_of(tool)), *words], log, environ(tool, out, job.threads, call.env), out, limit=1800)
    if ours and done.status == 0:
        shutil.copyfile(log, file)
        inside("reference.py", job.model, file, folder / f"{name}.jsonl")
        file = folder / f"{name}.jsonl"
    if done.status or not file.exists():
        raise RuntimeError(f"{tool.name}: the check failed with status {done.status}; see {log}")
    return recorded(file)


def check(tools: list[Tool], job: Job, folder: Path) -> dict[str, Counts]:
    """Compare each tool's rows with the reference, print a line each."""
    fresh(folder)
    inside("reference.py", job.model, job.train, folder / "reference.jsonl")
    reference = recorded(folder / "reference.jsonl")
    if long := [number for number, row in enumerate(reference) if len(row["ids"]) > job.max_length]:
        raise ValueError(
            f"rows {long} are longer than {job.max_length} tokens, where the tools do different things; leave them out"
        )
    found = {}
    for tool in tools:
        counts = found[tool.name] = results.compare(reference, record(tool, job, folder))
        print(
            f"check {tool.name}: {counts.tokens:,} tokens, {counts.trained:,} trained; to the reference: {counts.difference}",
            flush=True,
        )
    write_json(folder / "counts.json", {name: asdict(counts) for name, counts in found.items()})
    return found


def one_run(tool: Tool, number: int, job: Job, folder: Path) -> Result:
    """Train once. The run's caches lie in its folder, and are removed after it."""
    out = fresh(folder / folder_of(tool.name, number))
    call = tool.train(job, out / "run")
    scratch = out / "caches"
    measured = run([str(python_of(tool)), *call.words], out / "log.txt", environ(tool, scratch, job.threads, call.env), out)
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        found = results.result(tool, number, measured)
    except ValueError as err:
        raise RuntimeError(f"{err}; see {out / 'log.txt'}") from None
    if measured.status:
        raise RuntimeError(f"{tool.name}: status {measured.status} after {found.steps} steps; see {out / 'log.txt'}")
    print(
        f"round {number} {tool.name}: {found.steps} steps in {found.training:.1f} s, wall {found.seconds:.1f} s, first step "
        f"done at {found.first_step:.1f} s, peak {found.peak_bytes / results.MIB:.0f} MiB, loss {found.train_loss:.4f}",
        flush=True,
    )
    return found


def judge(found: list[Result], tools: list[Tool], job: Job, held: Path, folder: Path) -> list[Result]:
    """The held-out loss of every adapter, and of the model without one."""
    inside("reference.py", job.model, held, folder / "held-reference.jsonl")
    by_name = {tool.name: tool for tool in tools}
    names = [folder_of(one.tool, one.round) for one in found]
    adapters = [by_name[one.tool].adapter(folder / name / "run") for one, name in zip(found, names, strict=True)]
    pairs = [f"{number}={path}" for number, path in enumerate(adapters)]
    inside("held_out.py", job.model, folder / "held-reference.jsonl", folder / "held.json", *pairs)
    said = json.loads((folder / "held.json").read_text(encoding="utf-8"))
    print(f"held-out loss of the model before training: {said['losses']['base']:.4f} over {said['tokens']:,} tokens")
    return [replace(one, held_loss=said["losses"][str(number)]) for number, one in enumerate(found)]


def work(job: Job, reference: list[dict[str, Any]]) -> float:
    """Operations of the whole run; see machine.lora_flops."""
    shapes = machine.shapes_of(json.loads((job.model / "config.json").read_text(encoding="utf-8")), job.rank)
    trained = sum(label != -100 for row in reference for label in row["labels"])
    lengths = [len(row["ids"]) for row in reference]
    return machine.lora_flops(shapes, sum(lengths), trained, sum(length**2 for length in lengths))


def limits(threads: int) -> dict[str, Any]:
    """The machine's rates, measured in a process of its own."""
    script = REPOSITORY / "benchmarks" / "machine.py"
    done = subprocess.run(
        [judge_python(), str(script), "--threads", str(threads), "--json"], capture_output=True, text=True, check=True
    )
    return dict(json.loads(done.stdout))


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def report(found: list[Result], counts: dict[str, Counts], job: Job, folder: Path) -> None:
    """Print and write the table, and how swift-core stands to each peer."""
    flops = work(job, recorded(folder / "check" / "reference.jsonl"))
    rates = limits(job.threads)
    rows = results.summary(found, counts, job.batch, flops)
    limit = rates["limit"]["bf16"]
    lines = [results.table(rows), "", *results.ratios(rows), "", machine.printed(rates), ""]
    lines += [
        f"{row['tool']}: {rate:.0f} of {limit:.0f} GFLOP/s, {rate / limit:.0%} of the bf16 limit"
        for row in rows
        if (rate := row["gflops_per_second"])
    ]
    text = "\n".join(lines)
    print(f"\n{text}")
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    write_json(folder / "results.json", {"summary": rows, "runs": results.as_json(found), "flops": flops, "machine": rates})


def main() -> None:
    args = arguments()
    tools = chosen(args)
    if args.setup:
        for tool in tools:
            print(f"setting up {tool.name}", flush=True)
            environments.setup(tool)
        return
    rows = read_rows(args.data)
    folder = args.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    train = write_rows(rows[: args.rows], folder / "train.jsonl")
    held = write_rows(rows[args.rows : args.rows + args.held], folder / "held.jsonl")
    job = Job((args.model or embedded_model()).resolve(), train, threads=args.threads, limit=args.limit)
    if args.checked:
        counts = check(tools, job, folder / "check")
    else:
        saved = json.loads((folder / "check" / "counts.json").read_text(encoding="utf-8"))
        counts = {name: Counts(**value) for name, value in saved.items()}
    if args.check:
        return
    found: list[Result] = []
    for number in range(args.rounds):
        turn = number % len(tools)
        for tool in tools[turn:] + tools[:turn]:  # each round begins with another tool
            try:
                found.append(one_run(tool, number, job, folder))
            except RuntimeError as err:  # the others go on
                print(f"round {number}: {err}", flush=True)
            write_json(folder / "runs.json", results.as_json(found))
    report(judge(found, tools, job, held, folder), counts, job, folder)


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, FileNotFoundError, ValueError) as err:
        sys.exit(f"error: {err}")
