"""The engine `transformers` against the library's own batched `generate`, and what keeping prompts gives.

    python benchmarks/serve/engine.py [--quick] [--threads 2] [--rounds 3] [--model ID] [--precision fp32 bf16] [--json FILE]

Three jobs, each way in turn within each round, the best round counted: 16 prompts of 64 new tokens; 48 prompts of 16 to 256
new tokens, which `generate` does in batches of 16 in the order they come; and the time to the first token of a prompt whose
first 1,000 tokens were seen before, or not.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from swift_core.types import ModelBundle, Request
from swift_plugin_torch.config import TransformersEngineConfig
from swift_plugin_torch.engine import TransformersEngine

TALK = "a river of small grey stones runs under the old bridge where children count boats and wait for rain to end"
WORDS = TALK.split()


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


def first_token(engine: TransformersEngine, ids: list[int]) -> tuple[float, int]:
    """Seconds to the first token, and how many tokens of the prompt were kept from before."""
    begun = time.perf_counter()
    stream: Any = engine.generate([Request(token_ids=ids, max_tokens=1)])
    done = next(stream)
    return time.perf_counter() - begun, done.cached_tokens


def best(ways: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Tokens a second of each way, in turn within a round."""
    found = dict.fromkeys(ways, 0.0)
    for _ in range(rounds):
        for name, way in ways.items():
            begun = time.perf_counter()
            tokens = way()
            found[name] = max(found[name], tokens / (time.perf_counter() - begun))
    return found


def measure(model_id: str, precision: str, rounds: int, quick: bool) -> dict[str, Any]:
    from swift_core.config import Component, RunConfig
    from swift_core.models import resolve_model
    from swift_core.session import Session

    config = RunConfig(model=Component(model_id))
    with Session(config) as session:
        ref = resolve_model(session.registry, config.model)
        bundle: ModelBundle = session.bundle(ref)
        bundle.model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
        tokenizer = getattr(bundle.processor, "tokenizer", bundle.processor)
        pad = int(tokenizer.pad_token_id or 0)
        plain = copy.deepcopy(bundle.model)  # an engine lays out the weights of its model anew
        scale = 8 if quick else 1
        size = 16 // (4 if quick else 1)
        engine = TransformersEngine(bundle, TransformersEngineConfig(batch_size=size, prefix_mib=0))
        wide = TransformersEngine(bundle, TransformersEngineConfig(batch_size=3 * size, prefix_mib=0))
        kept = TransformersEngine(bundle, TransformersEngineConfig(batch_size=size, prefix_mib=512))
        found: dict[str, Any] = {"precision": precision, "threads": torch.get_num_threads()}

        equal, even = prompts(size, tokenizer), [64 // scale] * size
        by_engine(engine, equal[:2], even[:2])  # warm
        found["equal lengths, tokens/s"] = best(
            {
                "generate": lambda: by_generate(plain, equal, even, pad, size),
                "engine": lambda: by_engine(engine, equal, even),
            },
            rounds,
        )
        many, chance = prompts(3 * size, tokenizer, 1), random.Random(2)
        mixed = [chance.randint(16 // scale, 256 // scale) for _ in many]
        found["mixed lengths, tokens/s"] = best(
            {
                "generate": lambda: by_generate(plain, many, mixed, pad, size),
                "engine": lambda: by_engine(engine, many, mixed),
                f"engine, batch_size {3 * size}": lambda: by_engine(wide, many, mixed),
            },
            max(1, rounds - 1),
        )
        shared = [token for ids in prompts(60, tokenizer, 3) for token in ids][: 1000 // scale]
        first_token(kept, [*shared, 5])
        cold, warm, cached = [], [], 0
        for n in range(rounds):
            cold.append(first_token(engine, [*shared, 10 + n, 11])[0])
            seconds, cached = first_token(kept, [*shared, 10 + n, 11])
            warm.append(seconds)
        found["first token of a prompt of 1,000, seconds"] = {"read": min(cold), "kept": min(warm), "kept tokens": cached}
        for made in (engine, wide, kept):
            made.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="an eighth of the work: for tests")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = []
    for precision in args.precision:
        results.append(measure(args.model, precision, args.rounds, args.quick))
        print(json.dumps(results[-1], indent=1), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
