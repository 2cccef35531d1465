"""LLaMA-Factory 0.9.5: `llamafactory-cli train`, which reads a YAML file (JSON is YAML)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks.train.job import Job
from benchmarks.train.tools import Call, Tool, hf_begins, hf_step

SETTINGS: dict[str, Any] = {
    "bf16": True,  # loads the base model in bf16, computes under autocast, keeps the adapter in fp32
    "use_cpu": True,
    "disable_gradient_checkpointing": True,  # on by default; recomputes the forward pass
    "flash_attn": "disabled",  # eager: a tenth less time than sdpa on a CPU at these lengths, in more memory
    "train_sampling_strategy": "group_by_length",  # rows of like length in a batch: little padding
    "dataloader_num_workers": 0,  # both cores compute
}


def train(job: Job, out: Path) -> Call:
    """A data folder of its own form: the file and an index of it. The system message stands in the rows."""
    data = out / "rows"
    data.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(job.train, data / "train.jsonl")
    tags = {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
    }
    entry = {"file_name": "train.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    (data / "dataset_info.json").write_text(json.dumps({"rows": entry}), encoding="utf-8")
    config = {
        "model_name_or_path": str(job.model), "stage": "sft", "do_train": True, "finetuning_type": "lora",
        "lora_rank": job.rank, "lora_alpha": job.alpha, "lora_dropout": 0.0, "lora_target": "all",
        "dataset_dir": str(data), "dataset": "rows", "template": "smollm2", "cutoff_len": job.max_length,
        "overwrite_cache": True,
        "output_dir": str(out / "run"), "per_device_train_batch_size": job.batch, "gradient_accumulation_steps": 1,
        "learning_rate": job.rate, "lr_scheduler_type": "cosine", "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 1.0,
        "num_train_epochs": 1.0, "max_steps": job.limit or -1, "seed": job.seed, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "preprocessing_num_workers": job.workers if job.workers > 1 else None, **SETTINGS,
    }  # fmt: skip
    file = out / "job.yaml"
    file.write_text(json.dumps(config, indent=1), encoding="utf-8")
    return Call(["-m", "llamafactory.cli", "train", str(file)])


def adapter(out: Path) -> Path:
    return out / "run"


def mend(venv: Path) -> None:
    """torchaudio, which LLaMA-Factory imports, is on PyPI with CUDA parts that do not load beside a CPU torch. Without its
    native part it imports, and nothing here touches audio. torchvision, whose import fails alike, is not needed at all."""
    for file in venv.glob("lib/python3*/site-packages/torchaudio/lib/_torchaudio*.so"):
        file.unlink()


TOOL = Tool("llama-factory", "0.9.5", train, adapter, hf_begins, hf_step, mend=mend)
