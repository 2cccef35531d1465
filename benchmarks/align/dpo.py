"""The same DPO job with swift-core, TRL and ms-swift, each in its environment, interleaved, and a table of what it took.

    .venv/bin/python -m benchmarks.train.run --setup                       make the peers' environments (once)
    .venv/bin/python -m benchmarks.align.dpo --data FILE                   an epoch with each tool, and the table
    .venv/bin/python -m benchmarks.align.dpo --data FILE --limit 2         two steps: a trial

LoRA on all linear layers, loss sigmoid, the reference by the adapter switched off. Seconds count from the beginning of the
first step to the end of the last, seen from outside. FILE: ShareGPT pairs, such as dpo_en_demo.json. All is written below
--output.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.align import dpo_rows
from benchmarks.train.environments import REPOSITORY, TOOLS, environ, python_of
from benchmarks.train.job import Job
from benchmarks.train.measure import run
from benchmarks.train.results import MIB, Result, result
from benchmarks.train.run import embedded_model, folder_of, fresh, judge_python, write_json
from benchmarks.train.tools import Call, Tool
from benchmarks.train.tools.swift_core import START

NAMES = ("swift-core", "trl", "ms-swift")
BETA = 0.1
COMMON = [
    "--weight_decay",
    "0",
    "--max_grad_norm",
    "1.0",
    "--num_train_epochs",
    "1",
    "--logging_steps",
    "1",
    "--report_to",
    "none",
]


def schedule(job: Job) -> list[str]:
    """Words that transformers' Trainer takes, in TRL and in ms-swift alike."""
    return [
        "--per_device_train_batch_size", str(job.batch), "--learning_rate", str(job.rate), "--lr_scheduler_type", "cosine",
        "--seed", str(job.seed), "--gradient_checkpointing", "false", "--dataloader_num_workers", "0", "--use_cpu", "true",
        "--report_to", "none",
        *(["--max_steps", str(job.limit)] if job.limit else []), *COMMON,
    ]  # fmt: skip


def swift_core(job: Job, out: Path) -> Call:
    return Call([
        *START, "train", "--model", str(job.model), "--dataset", str(job.train / "messages.jsonl"), "--output", str(out),
        "--tuner", "lora", f"tuner.rank={job.rank}", f"tuner.alpha={job.alpha}", "tuner.dropout=0", "--trainer", "dpo",
        f"trainer.beta={BETA}", f"trainer.batch_size={job.batch}", f"trainer.learning_rate={job.rate}",
        f"trainer.max_length={job.max_length}", "trainer.schedule=cosine", "trainer.warmup=0", f"seed={job.seed}",
        f"backend.threads={job.threads}", "backend.precision=bf16",
        *([f"trainer.max_steps={job.limit}"] if job.limit else []),
    ])  # fmt: skip


def trl(job: Job, out: Path) -> Call:
    """Padding-free batches are not to be had for DPO in this version; rows of like length, by the column `length`, are."""
    data = out / "rows"
    data.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(job.train / "prompts.jsonl", data / "train.jsonl")
    return Call([
        "-m", "trl.scripts.dpo", "--model_name_or_path", str(job.model), "--dataset_name", str(data), "--output_dir", str(out),
        "--use_peft", "true", "--lora_r", str(job.rank), "--lora_alpha", str(job.alpha), "--lora_dropout", "0",
        "--lora_target_modules", "all-linear", "--beta", str(BETA), "--max_length", str(job.max_length), "--dtype", "bfloat16",
        "--bf16", "true", "--attn_implementation", "eager", "--train_sampling_strategy", "group_by_length",
        "--remove_unused_columns", "false",
        "--warmup_steps", "0", "--save_strategy", "no", *schedule(job),
    ])  # fmt: skip


def ms_swift(job: Job, out: Path) -> Call:
    return Call([
        "-m", "swift.cli.rlhf", "--rlhf_type", "dpo", "--model", str(job.model), "--model_type", "llama",
        "--template", "chatml", "--dataset", str(job.train / "messages.jsonl"), "--split_dataset_ratio", "0",
        "--output_dir", str(out), "--add_version", "false",
        "--tuner_type", "lora", "--lora_rank", str(job.rank), "--lora_alpha", str(job.alpha),
        "--lora_dropout", "0", "--target_modules", "all-linear", "--beta", str(BETA), "--max_length", str(job.max_length),
        "--torch_dtype", "bfloat16", "--attn_impl", "eager", "--group_by_length", "true", "--gradient_accumulation_steps", "1",
        "--warmup_ratio", "0", "--adam_beta2", "0.999", "--save_only_model", "true", "--check_model", "false",
        "--dataset_num_proc", "1", *schedule(job),
    ])  # fmt: skip


TRAIN = {"swift-core": swift_core, "trl": trl, "ms-swift": ms_swift}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a .json file of ShareGPT pairs")
    parser.add_argument("--rows", type=int, default=128, help="pairs, from the file's start [%(default)s]")
    parser.add_argument("--batch", type=int, default=4, help="pairs of a step [%(default)s]")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of a side at most; longer rows are left out")
    parser.add_argument("--tools", default=",".join(NAMES), help="[%(default)s]")
    parser.add_argument(
        "--also", action="append", default=[], metavar="WORDS", help="a tool and words that override its settings: "
        "'trl --attn_implementation sdpa'",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=1, help="runs of each tool; medians are printed [%(default)s]")
    parser.add_argument("--limit", type=int, help="steps at most, for a trial")
    parser.add_argument("--model", type=Path, help="a checkpoint's folder [the embedded model]")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="[%(default)s]")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "runs" / "bench-dpo", help="[%(default)s]")
    args = parser.parse_args()
    named = [*filter(None, args.tools.split(",")), *(words.split()[0] for words in args.also)]
    if unknown := [name for name in named if name not in TRAIN]:
        parser.error(f"--tools, --also: unknown {', '.join(unknown)}; known: {', '.join(TRAIN)}")
    return args


def chosen(args: argparse.Namespace) -> list[Tool]:
    """The tools of the training benchmark, with DPO in place of supervised training."""
    tools = {name: replace(TOOLS[name], train=train, prepare=None) for name, train in TRAIN.items()}
    varied = [words.split() for words in args.also]
    return [*(tools[name] for name in args.tools.split(",") if name), *(tools[name].varied(words) for name, *words in varied)]


def rows(model: Path, args: argparse.Namespace, folder: Path) -> dict[str, int]:
    """Write the rows of all tools. What was taken."""
    words = [str(Path(dpo_rows.__file__)), model, args.data, folder, args.rows, args.max_length]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([judge_python(), *map(str, words)], capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise RuntimeError(f"the rows of {args.data} could not be read: {done.stderr.strip().splitlines()[-1]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def one_run(tool: Tool, number: int, job: Job, folder: Path) -> Result:
    """Train once. The run's caches lie in its folder, and are removed after it. Raises RuntimeError."""
    out = fresh(folder / folder_of(tool.name, number))
    call, scratch = tool.train(job, out / "run"), out / "caches"
    measured = run([str(python_of(tool)), *call.words], out / "log.txt", environ(tool, scratch, job.threads, call.env), out)
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        found = result(tool, number, measured)
    except ValueError as err:
        raise RuntimeError(f"{err}; see {out / 'log.txt'}") from None
    if measured.status:
        raise RuntimeError(f"{tool.name}: status {measured.status} after {found.steps} steps; see {out / 'log.txt'}")
    print(
        f"round {number} {tool.name}: {found.steps} steps in {found.training:.1f} s, wall {found.seconds:.1f} s, peak "
        f"{found.peak_bytes / MIB:.0f} MiB, loss {found.train_loss:.4f}",
        flush=True,
    )
    return found


def table(found: list[Result], batch: int) -> str:
    """Medians of the rounds, each column by itself."""
    lines = ["| tool | s a step | rows a second | peak MiB | wall s | mean loss |", "|---|---:|---:|---:|---:|---:|"]
    for name in dict.fromkeys(one.tool for one in found):
        own = [one for one in found if one.tool == name]
        step = statistics.median(one.training / one.steps for one in own)
        peak, wall, loss = (
            statistics.median(value(one) for one in own)
            for value in (lambda one: one.peak_bytes / MIB, lambda one: one.seconds, lambda one: one.train_loss)
        )
        lines.append(f"| {name} | {step:.2f} | {batch / step:.2f} | {peak:,.0f} | {wall:.1f} | {loss:.4f} |")
    return "\n".join(lines)


def main() -> None:
    args = arguments()
    tools, folder = chosen(args), args.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    model = (args.model or embedded_model()).resolve()
    taken = rows(model, args, folder)
    print(
        f"{taken['rows']} pairs, {taken['tokens']:,} tokens; prompts, which both sides have: {taken['of_prompts']:,}",
        flush=True,
    )
    job = Job(model, folder, batch=args.batch, max_length=args.max_length, threads=args.threads, limit=args.limit)
    found: list[Result] = []
    for number in range(args.rounds):
        turn = number % len(tools)
        for tool in tools[turn:] + tools[:turn]:  # each round begins with another tool
            try:
                found.append(one_run(tool, number, job, folder))
            except RuntimeError as err:  # the others go on
                print(f"round {number}: {err}", flush=True)
            write_json(folder / "results.json", {"rows": taken, "runs": [asdict(one) for one in found]})
    text = table(found, args.batch)
    print(f"\n{text}")
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, FileNotFoundError, ValueError) as err:
        sys.exit(f"error: {err}")
