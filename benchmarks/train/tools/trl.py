"""TRL 1.16.0: `trl sft`. Its loss takes the output layer on trained positions only, in chunks, by default."""

from __future__ import annotations

import shutil
from pathlib import Path

from benchmarks.train.job import Job
from benchmarks.train.tools import HERE, Call, Tool, hf_begins, hf_step

SETTINGS = [
    "--dtype", "bfloat16",  # the base model in bf16: no cast of each weight in each step
    "--bf16", "true", "--use_cpu", "true",
    "--gradient_checkpointing", "false",  # on by default; recomputes the forward pass
    "--attn_implementation", "sdpa",
    # Rows of a batch end to end, no padding. Documented for flash-attention; on sdpa transformers isolates the rows by their
    # position ids. Within a twentieth of eager attention on batches of like length, in 60 % of its memory.
    # It refuses a max_length; run.py refuses rows over it.
    "--padding_free", "true", "--max_length", "None",
    "--dataloader_num_workers", "0",  # both cores compute
]  # fmt: skip


def train(job: Job, out: Path) -> Call:
    """The data set is a folder with one file. The chat template is the checkpoint's with the marks that TRL's mask needs."""
    data = out / "rows"
    data.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(job.train, data / "train.jsonl")
    words = [
        "-m", "trl.scripts.sft", "--model_name_or_path", str(job.model), "--dataset_name", str(data), "--output_dir", str(out),
        "--assistant_only_loss", "true", "--chat_template_path", str(HERE / "templates" / "smollm2.jinja"),
        "--use_peft", "true", "--lora_r", str(job.rank), "--lora_alpha", str(job.alpha), "--lora_dropout", "0",
        "--lora_target_modules", "all-linear", "--per_device_train_batch_size", str(job.batch),
        "--learning_rate", str(job.rate), "--lr_scheduler_type", "cosine", "--warmup_steps", "0", "--weight_decay", "0",
        "--max_grad_norm", "1.0", "--num_train_epochs", "1", "--seed", str(job.seed),
        "--logging_steps", "1", "--save_strategy", "no", "--report_to", "none",
        *(["--dataset_num_proc", str(job.workers)] if job.workers > 1 else []),
        *(["--max_steps", str(job.limit)] if job.limit else []), *SETTINGS,
    ]  # fmt: skip
    return Call(words)


def adapter(out: Path) -> Path:
    return out


TOOL = Tool("trl", "1.16.0", train, adapter, hf_begins, hf_step)
