"""The same GRPO job with swift-core, TRL and ms-swift, each in its environment, interleaved, and a table of what it took.

    .venv/bin/python -m benchmarks.train.run --setup                make the peers' environments (once)
    .venv/bin/python -m benchmarks.align.grpo                       run each tool, print the table
    .venv/bin/python -m benchmarks.align.grpo --steps 2 --rounds 1  a trial

A step draws --generations answers to each of --prompts prompts in the training process, rewards them with one function, and
updates LoRA once. The learning rate is small, so that answers keep the length of the model's own, which is told. A rate is
answer tokens a second, from the beginning of the first step to the end of the last, seen from outside. It writes to --output.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.train.environments import REPOSITORY, TOOLS, environ, python_of
from benchmarks.train.job import write_rows
from benchmarks.train.measure import run
from benchmarks.train.results import MIB
from benchmarks.train.run import embedded_model, fresh
from benchmarks.train.tools import Tool

HERE = Path(__file__).resolve().parent
NAMES = ("swift-core", "trl", "ms-swift")


@dataclass(frozen=True)
class Job:
    """What every tool does."""

    model: str
    train: str
    output: str = ""
    figures: str = ""
    prompts: int = 4
    generations: int = 8
    max_tokens: int = 64
    steps: int = 6
    rank: int = 8
    alpha: int = 16
    rate: float = 1e-6
    kl: float = 0.0
    precision: str = "bf16"
    threads: int = 2


@dataclass(frozen=True)
class Result:
    tool: str
    round: int
    seconds: float
    training: float
    first_step: float
    tokens: float
    peak_bytes: int
    steps: int

    @property
    def rate(self) -> float:
        return self.tokens / self.training


def rows(count: int) -> list[dict[str, Any]]:
    """Questions that are answered in a few sentences."""
    drawn = random.Random(0)
    things = ["rivers", "bread", "the moon", "bicycles", "tea", "whales", "clocks", "snow", "music", "bridges", "ants", "glass"]
    asked = ["Tell me something about {}.", "Why do people like {}?", "Describe {} to a child.", "What is special about {}?"]
    texts = [question.format(thing) for question in asked for thing in things]
    return [{"messages": [{"role": "user", "content": text}]} for text in drawn.sample(texts, min(count, len(texts)))]


def ours(job: Job) -> list[str]:
    settings = {
        "trainer.rewards": f"[{HERE / 'grpo_reward.py'}:vowels]", "trainer.batch_size": job.prompts,
        "trainer.generations": job.generations, "trainer.max_tokens": job.max_tokens, "trainer.max_steps": job.steps,
        "trainer.learning_rate": job.rate, "trainer.kl": job.kl, "trainer.samples": 0, "tuner.rank": job.rank,
        "tuner.alpha": job.alpha, "tuner.dropout": 0, "backend.precision": job.precision, "backend.threads": job.threads,
        "engine.batch_size": job.prompts * job.generations,
    }  # fmt: skip
    words = ["-c", "from swift_core.cli.main import main; main()", "train", "--trainer", "grpo", "--tuner", "lora"]
    words += ["--model", job.model, "--dataset", job.train, "--output", job.output]
    return [*words, *(f"{key}={value}" for key, value in settings.items())]


def trl(job: Job) -> list[str]:
    file = Path(job.output).with_suffix(".job.json")
    file.write_text(json.dumps(asdict(job)), encoding="utf-8")
    return [str(HERE / "grpo_trl.py"), str(file)]


def ms_swift(job: Job) -> list[str]:
    settings = {
        "rlhf_type": "grpo", "model": job.model, "model_type": "llama", "template": "chatml", "dataset": job.train,
        "split_dataset_ratio": 0, "output_dir": job.output, "add_version": "false", "tuner_type": "lora",
        "lora_rank": job.rank, "lora_alpha": job.alpha, "lora_dropout": 0, "target_modules": "all-linear",
        "external_plugins": HERE / "grpo_reward.py", "reward_funcs": "vowels", "use_vllm": "false",
        "per_device_train_batch_size": job.prompts * job.generations, "gradient_accumulation_steps": 1,
        "num_generations": job.generations, "max_completion_length": job.max_tokens, "max_steps": job.steps,
        "learning_rate": job.rate, "lr_scheduler_type": "constant", "warmup_ratio": 0, "temperature": 1.0, "top_p": 1.0,
        "top_k": 0, "beta": job.kl, "loss_type": "grpo", "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "gradient_checkpointing": "false", "use_cpu": "true", "check_model": "false", "dataset_num_proc": 1, "seed": 0,
        "torch_dtype": {"bf16": "bfloat16", "fp32": "float32"}[job.precision], "attn_impl": "sdpa",
        "dataloader_num_workers": 0, "log_completions": "false",
    }  # fmt: skip
    return ["-m", "swift.cli.rlhf", *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]


WORDS: dict[str, Callable[[Job], list[str]]] = {"swift-core": ours, "trl": trl, "ms-swift": ms_swift}


def lengths(tool: str, job: Job) -> list[float]:
    """Mean tokens of an answer, step by step, as the tool logs them."""
    if tool == "swift-core":
        lines = (Path(job.output) / "log.jsonl").read_text(encoding="utf-8").splitlines()
        return [event["length"] for event in map(json.loads, lines) if event["event"] == "step"]
    if tool == "trl":
        return list(json.loads(Path(job.figures).read_text(encoding="utf-8")))
    lines = next(Path(job.output).rglob("logging.jsonl")).read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    return [float(entry["completions/mean_length"]) for entry in found if "completions/mean_length" in entry]


def one_run(tool: Tool, number: int, job: Job, folder: Path) -> Result:
    """Raises RuntimeError where the tool does not get through."""
    out = fresh(folder / f"{tool.name}-{number}")
    own = Job(**{**asdict(job), "output": str(out / "run"), "figures": str(out / "lengths.json")})
    scratch = out / "caches"
    env = environ(tool, scratch, job.threads, {"PYTHONPATH": str(HERE)})
    measured = run([str(python_of(tool)), *WORDS[tool.name](own)], out / "log.txt", env, out, limit=3600)
    shutil.rmtree(scratch, ignore_errors=True)
    begin, ends = 0.0, list[float]()
    for line in measured.lines:
        if not ends and tool.begins(line.text):
            begin = line.seconds
        if tool.step(line.text, len(ends) + 1):
            ends.append(line.seconds)
    if measured.status or not ends:
        raise RuntimeError(f"{tool.name}: status {measured.status} after {len(ends)} steps; see {out / 'log.txt'}")
    told = lengths(tool.name, own)
    tokens = sum(told) * job.prompts * job.generations
    found = Result(
        tool.name, number, measured.seconds, ends[-1] - begin, ends[0] - begin, tokens, measured.peak_bytes, len(ends)
    )
    print(
        f"round {number} {tool.name}: {found.steps} steps in {found.training:.1f} s, {found.rate:.1f} answer tokens/s, "
        f"{statistics.fmean(told):.1f} tokens an answer, wall {found.seconds:.1f} s, peak {found.peak_bytes / MIB:.0f} MiB",
        flush=True,
    )
    return found


def table(found: list[Result]) -> str:
    """Medians over rounds, and how swift-core stands to each peer."""
    lines = ["| tool | answer tokens/s | s a step | wall s | peak MiB |", "|---|---:|---:|---:|---:|"]
    names = list(dict.fromkeys(one.tool for one in found))

    def median(name: str, value: Callable[[Result], float]) -> float:
        return statistics.median(value(one) for one in found if one.tool == name)

    for name in names:
        cells = [
            f"{median(name, lambda one: one.rate):.1f}", f"{median(name, lambda one: one.training / one.steps):.2f}",
            f"{median(name, lambda one: one.seconds):.1f}", f"{median(name, lambda one: one.peak_bytes / MIB):.0f}",
        ]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name in names:
        if name != "swift-core" and "swift-core" in names:
            rate = median("swift-core", lambda one: one.rate) / median(name, lambda one: one.rate)
            memory = median("swift-core", lambda one: one.peak_bytes) / median(name, lambda one: one.peak_bytes)
            lines.append(f"\nswift-core to {name}: {rate:.2f} x answer tokens/s, {memory:.0%} of the peak memory")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tools", default=",".join(NAMES), help="names, in the order of the first round [%(default)s]")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each tool; medians are printed [%(default)s]")
    for name in ("steps", "prompts", "generations", "max_tokens"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Job, name), help="[%(default)s]")
    parser.add_argument("--kl", type=float, default=0.0, help="weight of the divergence from the reference [%(default)s]")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="[%(default)s]")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="[%(default)s]")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "runs" / "bench-grpo", help="[%(default)s]")
    args = parser.parse_args()
    tools = args.tools.split(",")
    if unknown := [name for name in tools if name not in NAMES]:
        parser.error(f"--tools: unknown {', '.join(unknown)}; known: {', '.join(NAMES)}")
    folder = args.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    train = write_rows(rows(48), folder / "rows.jsonl")
    given = {
        name: getattr(args, name) for name in ("steps", "prompts", "generations", "max_tokens", "kl", "precision", "threads")
    }
    job = Job(str(embedded_model().resolve()), str(train), **given)
    found: list[Result] = []
    for number in range(args.rounds):
        turn = number % len(tools)
        for name in tools[turn:] + tools[:turn]:  # each round begins with another tool
            try:
                found.append(one_run(TOOLS[name], number, job, folder))
            except RuntimeError as err:  # the others go on
                print(f"round {number}: {err}", flush=True)
    text = table(found)
    print(f"\n{text}")
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    (folder / "results.json").write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, FileNotFoundError, ValueError) as err:
        sys.exit(f"error: {err}")
