"""ms-swift 4.6.0: `swift sft`. Packing and padding-free batches ask for flash-attention there, which a CPU does not have."""

from __future__ import annotations

from pathlib import Path

from benchmarks.train.job import Job
from benchmarks.train.tools import Call, Tool, hf_begins, hf_step

SETTINGS = [
    "--torch_dtype", "bfloat16",  # the base model in bf16: no cast of each weight in each step
    "--gradient_checkpointing", "false",  # on by default; recomputes the forward pass
    "--attn_impl", "eager",  # a tenth less time than sdpa on a CPU at these lengths, in more memory
    "--use_logits_to_keep", "true",  # the output layer only where some row of the batch is trained
    "--group_by_length", "true",  # rows of like length in a batch: little padding
    "--dataloader_num_workers", "0",  # both cores compute
    "--use_cpu", "true",  # without it transformers refuses bf16
]  # fmt: skip


def train(job: Job, out: Path) -> Call:
    words = [
        "-m", "swift.cli.sft", "--model", str(job.model), "--model_type", "llama", "--template", "chatml",
        "--dataset", str(job.train), "--split_dataset_ratio", "0", "--output_dir", str(out), "--add_version", "false",
        "--tuner_type", "lora", "--lora_rank", str(job.rank), "--lora_alpha", str(job.alpha), "--lora_dropout", "0",
        "--target_modules", "all-linear", "--per_device_train_batch_size", str(job.batch), "--gradient_accumulation_steps", "1",
        "--learning_rate", str(job.rate), "--lr_scheduler_type", "cosine", "--warmup_ratio", "0", "--weight_decay", "0",
        "--adam_beta2", "0.999", "--max_grad_norm", "1.0", "--num_train_epochs", "1", "--max_length", str(job.max_length),
        "--seed", str(job.seed), "--logging_steps", "1", "--save_only_model", "true", "--report_to", "none",
        "--check_model", "false", "--dataset_num_proc", str(job.workers),
        *(["--max_steps", str(job.limit)] if job.limit else []), *SETTINGS,
    ]  # fmt: skip
    return Call(words)


def adapter(out: Path) -> Path:
    """The newest checkpoint, by its step."""
    return max(out.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]), default=out)


TOOL = Tool("ms-swift", "4.6.0", train, adapter, hf_begins, hf_step)
