"""The engine `transformers` against the library's own batched `generate`, and what keeping prompts gives.

    python benchmarks/serve/engine.py [--quick] [--threads 2] [--rounds 3] [--model ID] [--precision fp32 bf16] [--json FILE]
                                      [--processor-time] [--jobs equal mixed first copying]

Four jobs, each way in turn within each round, the best round counted: 16 prompts of 64 new tokens; 48 prompts of 16 to 256
new tokens, which `generate` does in batches of 16 in the order they come; the time to the first token of a prompt whose first
1,000 tokens were seen before, or not; and one answer that copies a paragraph, with and without guesses from its n-grams.
`--processor-time` counts seconds of all cores in place of the clock's: for a machine that does other work as well.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from swift_core.types import ModelBundle, Request
from swift_plugin_torch.config import TransformersEngineConfig
from swift_plugin_torch.engine import TransformersEngine

TALK = "a river of small grey stones runs under the old bridge where children count boats and wait for rain to end"
WORDS = TALK.split()
PARAGRAPH = (
    "The old harbour of Brindle lies between two low hills. Every morning at six the ferry leaves for the island of Marrow, "
    "carrying flour, letters and a few sleepy passengers. The captain, Anna Holt, has made the crossing nine thousand times."
)
Clock = Callable[[], float]


def prompts(count: int, tokenizer: Any, seed: int = 0) -> list[list[int]]:
    """Questions of 8 to 40 words each, as token ids."""
    chance = random.Random(seed)
    texts = ["Write about: " + " ".join(chance.choices(WORDS, k=chance.randint(8, 40))) for _ in range(count)]
    return [tokenizer(text)["input_ids"] for text in texts]


def by_generate(model: Any, batch: list[list[int]], lengths: list[int], pad: int, size: int) -> int:
    """Padded batches of `size`; each goes on until its longest answer is done. Returns the tokens that were asked for."""
    for start in range(0, len(batch), size):
        part, width = batch[start : start + size], max(map(len, batch[start : start + size]))
        ids = torch.tensor([[pad] * (width - len(own)) + own for own in part])
        mask = torch.tensor([[0] * (width - len(own)) + [1] * len(own) for own in part])
        count = max(lengths[start : start + size])
        made = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=pad
        )
        assert made.shape[1] == width + count
    return sum(lengths)


def by_engine(engine: TransformersEngine, batch: list[list[int]], lengths: list[int]) -> int:
    asked = [Request(token_ids=ids, max_tokens=count, ignore_eos=True) for ids, count in zip(batch, lengths, strict=True)]
    made = sum(len(done.token_ids) for done in engine.generate(asked))
    assert made == sum(lengths)
    return made


def first_token(engine: TransformersEngine, ids: list[int], clock: Clock) -> tuple[float, int]:
    """Seconds to the first token, and how many tokens of the prompt were kept from before."""
    begun = clock()
    stream: Any = engine.generate([Request(token_ids=ids, max_tokens=1)])
    done = next(stream)
    return clock() - begun, done.cached_tokens


def best(ways: dict[str, Callable[[], int]], rounds: int, clock: Clock) -> dict[str, float]:
    """Tokens a second of each way, in turn within a round."""
    found = dict.fromkeys(ways, 0.0)
    for _ in range(rounds):
        for name, way in ways.items():
            begun = clock()
            tokens = way()
            found[name] = max(found[name], tokens / (clock() - begun))
    return found


@dataclass
class Bench:
    """The model in one precision: as it is for `generate`, and for each engine that is asked for."""

    plain: Any
    bundle: ModelBundle
    rounds: int
    scale: int  # the work is divided by it
    clock: Clock

    @property
    def size(self) -> int:
        return max(4, 16 // self.scale)

    @property
    def tokenizer(self) -> Any:
        return getattr(self.bundle.processor, "tokenizer", self.bundle.processor)

    def engine(self, **options: Any) -> TransformersEngine:
        """On the one model that all engines share: its weights are laid out anew by the first."""
        return TransformersEngine(self.bundle, TransformersEngineConfig(**{"prefix_mib": 0, **options}))

    def by_generate(self, batch: list[list[int]], lengths: list[int]) -> int:
        return by_generate(self.plain, batch, lengths, int(self.tokenizer.pad_token_id or 0), self.size)

    def equal(self) -> dict[str, float]:
        batch, lengths = prompts(self.size, self.tokenizer), [64 // self.scale] * self.size
        engine = self.engine(batch_size=self.size)
        by_engine(engine, batch[:2], lengths[:2])  # warm
        ways = {"generate": lambda: self.by_generate(batch, lengths), "engine": lambda: by_engine(engine, batch, lengths)}
        return best(ways, self.rounds, self.clock)

    def mixed(self) -> dict[str, float]:
        batch, chance = prompts(3 * self.size, self.tokenizer, 1), random.Random(2)
        lengths = [chance.randint(16 // self.scale, 256 // self.scale) for _ in batch]
        engine, wide = self.engine(batch_size=self.size), self.engine(batch_size=3 * self.size)
        by_engine(engine, batch[:2], [2, 2])  # warm
        ways = {
            "generate": lambda: self.by_generate(batch, lengths), "engine": lambda: by_engine(engine, batch, lengths),
            f"engine, batch_size {3 * self.size}": lambda: by_engine(wide, batch, lengths),
        }  # fmt: skip
        return best(ways, max(1, self.rounds - 1), self.clock)

    def first(self) -> dict[str, float]:
        engine, kept = self.engine(batch_size=self.size), self.engine(batch_size=self.size, prefix_mib=512)
        shared = [token for ids in prompts(60, self.tokenizer, 3) for token in ids][: 1000 // self.scale]
        first_token(kept, [*shared, 5], self.clock)
        cold, warm, cached = [], [], 0
        for n in range(self.rounds):
            cold.append(first_token(engine, [*shared, 10 + n, 11], self.clock)[0])
            seconds, cached = first_token(kept, [*shared, 10 + n, 11], self.clock)
            warm.append(seconds)
        return {"read": min(cold), "kept": min(warm), "kept tokens": cached}

    def copying(self) -> dict[str, float]:
        """One answer that repeats a paragraph: tokens a second, and how many of the guesses were right."""
        talk = [{"role": "user", "content": f"Repeat this text word for word:\n\n{PARAGRAPH}"}]
        asked, told = Request(talk, max_tokens=64 // self.scale), {}

        def way(name: str, engine: TransformersEngine) -> int:
            (told[name],) = engine.generate([asked])
            return len(told[name].token_ids)

        engines = {"engine": self.engine(), "ngrams=3": self.engine(ngrams=3)}
        for name, engine in engines.items():
            way(name, engine)  # warm
        rates = best({name: partial(way, name, engine) for name, engine in engines.items()}, self.rounds, self.clock)
        assert told["engine"].token_ids == told["ngrams=3"].token_ids
        return {**rates, "guessed": told["ngrams=3"].drafted, "right": told["ngrams=3"].accepted}


JOBS = {
    "equal": "equal lengths, tokens/s", "mixed": "mixed lengths, tokens/s",
    "first": "first token of a prompt of 1,000, seconds", "copying": "copying a paragraph, tokens/s",
}  # fmt: skip


def measure(model_id: str, precision: str, rounds: int, quick: bool, jobs: list[str], clock: Clock) -> dict[str, Any]:
    from swift_core.config import Component, RunConfig
    from swift_core.models import resolve_model
    from swift_core.session import Session

    config = RunConfig(model=Component(model_id))
    with Session(config) as session:
        bundle: ModelBundle = session.bundle(resolve_model(session.registry, config.model))
        bundle.model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
        bench = Bench(copy.deepcopy(bundle.model), bundle, rounds, 8 if quick else 1, clock)
        found: dict[str, Any] = {"precision": precision, "threads": torch.get_num_threads()}
        for job in jobs:
            found[JOBS[job]] = getattr(bench, job)()
            print(f"{precision}, {JOBS[job]}: {found[JOBS[job]]}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="an eighth of the work: for tests")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--processor-time", action="store_true", help="seconds of all cores in place of the clock's")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = []
    for precision in args.precision:
        clock = time.process_time if args.processor_time else time.perf_counter
        results.append(measure(args.model, precision, args.rounds, args.quick, args.jobs, clock))
        print(json.dumps(results[-1], indent=1), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
