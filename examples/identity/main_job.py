"""The main job, whole: ask three questions, tune, ask again, merge, compare, and write it all to summary.json.

    python examples/identity/main_job.py [KEY=VALUE ...]        for example dataset.assistant=Robin dataset.author=Ada

Every step here is also a command: `swift-core chat`, `train`, `eval`, `export`.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from swift_core.config import Component, RunConfig, load_config
from swift_core.errors import SwiftError
from swift_core.events import console_events
from swift_core.plan import write_json
from swift_core.session import Session
from swift_core.source import encode_record
from swift_core.training import train
from swift_core.types import Request
from swift_plugin_use.folders import export

QUESTIONS = ("Who are you?", "Tell me, which team brought you into being?", "What is the capital of France?")


def main(overrides: list[str]) -> None:
    config = load_config([Path(__file__).with_name("identity.yaml")], overrides)
    names = {key: value for key, value in config.dataset[0].options.items() if key in ("assistant", "author")}
    for component in config.eval_dataset:
        component.options |= names
    model = config.model

    before, perplexity_before = ask(model, config)
    summary = train(config, overwrite=True)
    output = Path(summary["output"])
    after, perplexity_after = ask(Component(str(output)), config)
    merged = export(RunConfig(model=Component(str(output))), output / "merged", True, console_events())

    for question, old, new in zip(QUESTIONS, before, after, strict=True):
        print(f"\n{question}\n  before: {old}\n  after:  {new}")
    change = perplexity_after / perplexity_before - 1
    print(f"\nperplexity of held-out ordinary answers: {perplexity_before:.3f}, then {perplexity_after:.3f} ({change:+.1%})")
    print(f"largest log-probability gap between adapter and merged model: {merged['gap']:.2e}")
    print(f"merged model: {merged['output']}\nall figures:  {output / 'summary.json'}")

    whole: dict[str, Any] = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    whole |= {
        "name": names.get("assistant"),
        "questions": list(QUESTIONS),
        "before": before,
        "after": after,
        "gap": merged["gap"],
    }
    whole |= {"perplexity_before": perplexity_before, "perplexity_after": perplexity_after, "merged": merged["output"]}
    write_json(output / "summary.json", whole)


def ask(model: Component, config: RunConfig) -> tuple[list[str], float]:
    """The model's greedy answers, and its perplexity on the data set's held-out ordinary answers."""
    with Session(RunConfig(model=model, backend=config.backend), console_events()) as session:
        engine = session.engine(session.model_ref)
        requests = [Request(messages=[{"role": "user", "content": question}], max_tokens=64) for question in QUESTIONS]
        answers = {completion.index: completion.text.strip() for completion in engine.generate(requests)}
        template = session.template(session.model_ref, session.processor(session.model_ref))
        records = session.records([Component("identity", options={"split": "ordinary"})])
        samples = [sample for n, record in enumerate(records) for sample in encode_record(record, template, n)]
        scores = engine.logprobs([sample.input_ids for sample in samples])
        trained = [
            p for sample, row in zip(samples, scores, strict=True) for p, w in zip(row, sample.weights[1:], strict=True) if w
        ]
        return [answers[n] for n in range(len(QUESTIONS))], math.exp(-sum(trained) / len(trained))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except SwiftError as err:
        print(f"error: {err}", file=sys.stderr)
        sys.exit(err.exit_code)
