"""swift-core, from this repository. Its settings for the comparison stand in SETTINGS and nowhere else."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.train.job import Job
from benchmarks.train.tools import Call, Step, Tool

SETTINGS = [
    "backend.precision=bf16",  # computes in bf16, keeps the adapter in fp32
]

START = ["-c", "from swift_core.cli.main import main; main()"]
STEP = re.compile(r"^step (\d+)/\d+\s+loss (\S+)")


def options(job: Job, out: Path) -> list[str]:
    return [
        "--model", str(job.model), "--dataset", str(job.train), "--output", str(out), "--tuner", "lora",
        f"tuner.rank={job.rank}", f"tuner.alpha={job.alpha}", "tuner.dropout=0",
        f"trainer.batch_size={job.batch}", f"trainer.learning_rate={job.rate}", f"trainer.max_length={job.max_length}",
        "trainer.epochs=1", "trainer.schedule=cosine", "trainer.warmup=0", "trainer.weight_decay=0", "trainer.clip=1.0",
        f"seed={job.seed}", f"backend.threads={job.threads}",
        *([f"trainer.max_steps={job.limit}"] if job.limit else []),
        *SETTINGS,
    ]  # fmt: skip


def train(job: Job, out: Path) -> Call:
    return Call([*START, "train", *options(job, out)])


def prepare(job: Job, out: Path) -> Call:
    return Call([*START, "train", *options(job, out), f"data_workers={job.workers}", "--dry-run"])


def inspect(job: Job) -> Call:
    """Prints what each row becomes, one JSON object a line."""
    return Call([*START, "inspect", "--model", str(job.model), "--dataset", str(job.train), "--json"])


def adapter(out: Path) -> Path:
    return (out / "checkpoints" / "last").resolve()


def begins(text: str) -> bool:
    return text.startswith("training ") and " parameters " in text


def step(text: str, number: int) -> Step | None:
    found = STEP.match(text)
    return Step(int(found[1]), float(found[2])) if found else None


TOOL = Tool("swift-core", "here", train, adapter, begins, step, prepare)
