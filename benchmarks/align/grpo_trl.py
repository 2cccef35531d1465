"""The GRPO job with TRL's GRPOTrainer, run by its own environment's interpreter: `python grpo_trl.py JOB.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from grpo_reward import vowels
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in Path(job["train"]).read_text(encoding="utf-8").splitlines()]
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[job["precision"]]
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype, attn_implementation="sdpa")
    rows_a_step = job["prompts"] * job["generations"]
    args = GRPOConfig(
        output_dir=job["output"], per_device_train_batch_size=rows_a_step, gradient_accumulation_steps=1,
        num_generations=job["generations"], max_completion_length=job["max_tokens"], max_steps=job["steps"], beta=job["kl"],
        learning_rate=job["rate"], lr_scheduler_type="constant", temperature=1.0, top_p=1.0, top_k=0, loss_type="grpo",
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, bf16=job["precision"] == "bf16", seed=0,
        gradient_checkpointing=False, dataloader_num_workers=0,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model, reward_funcs=vowels, args=args, processing_class=AutoTokenizer.from_pretrained(job["model"]),
        train_dataset=Dataset.from_list([{"prompt": row["messages"]} for row in rows]),
        peft_config=LoraConfig(
            r=job["rank"], lora_alpha=job["alpha"], lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )  # fmt: skip
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "completions/mean_length" in entry]
    Path(job["figures"]).write_text(json.dumps([entry["completions/mean_length"] for entry in history]), encoding="utf-8")


if __name__ == "__main__":
    main()
