"""A multimodal run that learns, whole: make pictures and a model, train it to read, and measure what it reads.

    python examples/digits/main.py [FOLDER] [KEY=VALUE ...]        FOLDER: runs/digits

Training and measuring are also commands: `swift-core train`, `swift-core eval` (see the README).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import strips
import tiny_model
from swift_core.config import Component, RunConfig, load_config
from swift_core.errors import SwiftError
from swift_core.events import console_events
from swift_core.plan import write_json
from swift_core.session import Session
from swift_core.training import train
from swift_core.types import EvalRun, Evaluator

TRAINING, HELD_OUT = 6000, 400  # rows
SETS = {"heldout": "held-out digits", "swapped": "pictures swapped", "blank": "empty pictures"}


def main(arguments: list[str]) -> None:
    named = [word for word in arguments if "=" not in word]
    if len(named) > 1 or any(word.startswith("-") for word in named):
        sys.exit(__doc__)
    folder = Path(named[0] if named else "runs/digits")
    config = load_config([Path(__file__).with_name("digits.yaml")], [word for word in arguments if "=" in word])
    config.model, config.dataset = Component(str(folder / "model")), [Component(str(folder / "data" / "train.jsonl"))]
    config.output = str(folder / "run")

    begun = time.monotonic()
    strips.write(folder / "data", TRAINING, HELD_OUT)
    weights = tiny_model.save(folder / "model")
    made = time.monotonic()
    train(config, overwrite=True)
    trained = time.monotonic()
    figures: dict[str, Any] = dict(measure(Component(str(folder / "run")), folder / "data"))
    seconds = {"made": made - begun, "trained": trained - made, "measured": time.monotonic() - trained}

    print(f"\n{weights:,} weights; " + ", ".join(f"{what} in {count:.0f} s" for what, count in seconds.items()))
    print(f"{'exact match':<20}{strips.READ:>20}{strips.LARGEST:>32}")
    for part, label in SETS.items():
        print(f"{label:<20}{figures[part][strips.READ]:>20.1%}{figures[part][strips.LARGEST]:>32.1%}")
    write_json(folder / "figures.json", {"weights": weights, "seconds": seconds, "exact_match": figures})


def measure(model: Component, data: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """For each held-out set, the share of exact answers to each question."""
    options = {"metrics": ["exact_match"], "max_tokens": 8}
    with Session(RunConfig(model=model, evaluator=Component("exact", options=options)), console_events()) as session:
        evaluator = session.call(session.choose("evaluators", session.config.evaluator), "swift_make_evaluator", Evaluator)
        template = session.template(session.model_ref, session.processor(session.model_ref))
        engine = session.engine(session.model_ref)
        for part in SETS:
            records = session.records([Component(str(data / f"{part}.jsonl"))])
            report = evaluator.evaluate(EvalRun(engine, records, template, session.events, session.part))
            asked = [record.row["messages"][0]["content"][-1]["text"].strip() for record in records]
            scores: dict[str, list[float]] = {}
            for question, row in zip(asked, report.rows, strict=True):
                scores.setdefault(question, []).append(row["scores"]["exact_match"])
            yield part, {question: sum(found) / len(found) for question, found in scores.items()}


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except SwiftError as err:
        print(f"error: {err}", file=sys.stderr)
        sys.exit(err.exit_code)
