"""One judge for all adapters: the mean loss of the trained tokens of held-out rows, in fp32, row by row, without padding.

    python held_out.py MODEL RECORDED.jsonl FILE NAME=ADAPTER...

RECORDED is written by reference.py. Uses transformers and peft alone. FILE gets {"tokens": n, "losses": {"base": x, NAME: y}}.
"""

import json
import sys
from pathlib import Path
from typing import Any


def mean_loss(model: Any, rows: list[dict[str, list[int]]]) -> float:
    """Sum of -log p over all trained tokens of all rows, divided by their number."""
    import torch

    total, count = 0.0, 0
    for row in rows:
        ids, labels = torch.tensor([row["ids"]]), torch.tensor(row["labels"][1:])
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
    return total / count


def main() -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    source, recorded, target, *adapters = sys.argv[1:]
    rows = [json.loads(line) for line in Path(recorded).read_text(encoding="utf-8").splitlines()]
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.eval()
    losses = {"base": mean_loss(model, rows)}
    for pair in adapters:
        name, _, folder = pair.partition("=")
        tuned = PeftModel.from_pretrained(model, folder).float().eval()
        losses[name] = mean_loss(tuned, rows)
        model = tuned.unload()
    tokens = sum(label != -100 for row in rows for label in row["labels"][1:])
    Path(target).write_text(json.dumps({"tokens": tokens, "losses": losses}), encoding="utf-8")


if __name__ == "__main__":
    main()
