"""Does an engine give the torch engine's tokens and log-probabilities? Fifty greedy answers, without or with an adapter.

    .venv/bin/python -m benchmarks.serve.agree vllm engine.dtype=float32
    .venv/bin/python -m benchmarks.serve.agree openvino engine.precision=fp32 --adapter random

A first token that differs is explained where the torch engine finds both within 1e-3 of each other; each is shown.
Exit code 1 where less than 95 % agree, a difference has no explanation, or log-probabilities differ by more than 1e-3.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swift_core.config import load_config
from swift_core.session import Opened, Session
from swift_core.types import Request

from benchmarks.serve.prompts import prompts

NEAR = 1e-3


@dataclass
class Agreement:
    """What was found: answers with the same tokens, those that part, and the largest gap of log-probabilities."""

    same: int = 0
    apart: list[str] = field(default_factory=list)  # a line for each, in words
    unexplained: int = 0
    gap: float = 0.0  # of the sequences' log-probabilities
    told_gap: float = 0.0  # of those that came with the answers, up to where they part

    @property
    def share(self) -> float:
        return self.same / (self.same + len(self.apart))

    def passes(self) -> bool:
        return self.share >= 0.95 and not self.unexplained and max(self.gap, self.told_gap) <= NEAR


def random_adapter(folder: str, output: Path, rank: int = 8, seed: int = 0) -> Path:
    """A LoRA adapter of a model with random weights, large enough to change what is answered."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights="gaussian", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    model.save_pretrained(str(output))
    return output


def engine_session(name: str, options: Sequence[str], model: str) -> Session:
    return Session(load_config([], ["backend.precision=fp32", *options], {"engine": name, "model": model}))


def answers(opened: Opened, requests: list[Request]) -> list[tuple[list[int], list[float]]]:
    """Token ids and their log-probabilities, in the order of the requests."""
    found = {done.index: (done.token_ids, done.logprobs) for done in opened.engine.generate(requests) if done.finish}
    return [found[n] for n in range(len(requests))]


def compare(reference: Opened, other: Opened, count: int, tokens: int, adapter: str | None = None) -> Agreement:
    """Greedy answers of both to the same prompts, and both's log-probabilities of the reference's."""
    assert reference.template is not None
    requests = [
        Request(token_ids=reference.template.prompt(messages), max_tokens=tokens, adapter=adapter)
        for messages in prompts(count)
    ]
    expected, got = answers(reference, requests), answers(other, requests)
    found = Agreement()
    sequences = []
    for request, (ids, values), (theirs, told) in zip(requests, expected, got, strict=True):
        sequences.append([*(request.token_ids or []), *ids])
        parted = next((n for n, (a, b) in enumerate(zip(ids, theirs, strict=False)) if a != b), None)
        agreed = min(len(ids), len(theirs)) if parted is None else parted
        gaps = [abs(a - b) for a, b in zip(values[:agreed], told[:agreed], strict=False)]
        found.told_gap = max([found.told_gap, *gaps])
        if parted is None and len(ids) == len(theirs):
            found.same += 1
            continue
        begun = sequences[-1][: len(request.token_ids or []) + agreed]
        pair = [ids[agreed : agreed + 1], theirs[agreed : agreed + 1]]
        text = f"token {agreed}: {pair[0]} and {pair[1]}"
        if all(pair):
            first, second = (reference.engine.logprobs([[*begun, one[0]]], adapter)[0][-1] for one in pair)
            text += f", log-probabilities {first:.5f} and {second:.5f}"
            found.unexplained += abs(first - second) > NEAR
        else:
            found.unexplained += 1
        found.apart.append(text)
    ours, theirs_scores = reference.engine.logprobs(sequences, adapter), other.engine.logprobs(sequences, adapter)
    found.gap = max(abs(a - b) for one, two in zip(ours, theirs_scores, strict=True) for a, b in zip(one, two, strict=True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("engine")
    parser.add_argument("options", nargs="*", metavar="KEY=VALUE", help="options of the engine: engine.dtype=float32")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--adapter", help="a LoRA folder, or `random`")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as scratch,
        engine_session("transformers", [], args.model) as ours,
        engine_session(args.engine, args.options, args.model) as theirs,
    ):
        reference, other = ours.opened(), theirs.opened()
        name: Any = None
        if args.adapter:
            assert reference.ref is not None
            folder = random_adapter(reference.ref.source, Path(scratch)) if args.adapter == "random" else Path(args.adapter)
            name = "tried"
            for opened in (reference, other):
                opened.engine.load_adapter(name, folder)
        found = compare(reference, other, args.prompts, args.tokens, name)
    print(f"{args.engine}: {found.same} of {args.prompts} answers have the torch engine's tokens ({found.share:.0%})")
    for line in found.apart:
        print(f"  apart at {line}")
    print(f"largest gap of log-probabilities: sequences {found.gap:.2e}, told with answers {found.told_gap:.2e}")
    sys.exit(not found.passes())


if __name__ == "__main__":
    main()
