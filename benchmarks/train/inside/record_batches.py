"""Runs a tool's own training module up to Trainer.train, and there writes down what it would train instead of training.

    python record_batches.py FILE MODULE ARGUMENTS...      FILE gets one JSON object a row: ids, labels (-100 where untrained)
    python record_batches.py - MODULE ARGUMENTS...         stops there and writes nothing: preparing the data alone

Runs in the tool's environment. Rows are taken from the tool's own loader, so what is written is what the model would see.
"""

import json
import os
import runpy
import sys
from collections.abc import Iterator
from typing import Any


def rows_of(batch: dict[str, Any]) -> Iterator[tuple[list[int], list[int]]]:
    """Rows of a batch without their padding. Rows laid end to end without padding part where the position restarts."""
    ids, labels, mask = batch["input_ids"], batch["labels"], batch.get("attention_mask")
    if mask is not None:
        for row, kept in enumerate(mask.bool()):
            yield ids[row][kept].tolist(), labels[row][kept].tolist()
        return
    starts = [n for n, position in enumerate(batch["position_ids"][0].tolist()) if position == 0]
    for start, end in zip(starts, [*starts[1:], ids.shape[1]], strict=True):
        yield ids[0][start:end].tolist(), labels[0][start:end].tolist()


def main() -> None:
    target, module, *arguments = sys.argv[1:]
    from transformers import Trainer

    def record(self: Any, *_: Any, **__: Any) -> None:
        if target != "-":
            with open(target, "w", encoding="utf-8") as file:
                for batch in self.get_train_dataloader():
                    for ids, labels in rows_of(batch):
                        file.write(json.dumps({"ids": ids, "labels": labels}) + "\n")
        print("stopped before training", flush=True)
        os._exit(0)

    Trainer.train = record  # type: ignore[assignment,method-assign]
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
