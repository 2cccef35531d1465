"""The two limits of this machine: how fast it multiplies matrices, and how fast it copies memory.

    python benchmarks/machine.py [--threads N] [--json]

Shapes are those of the embedded model's layers at several numbers of tokens, and large squares. A rate is 2 M K N / seconds;
best and median of the repeats. Also here: the arithmetic of a LoRA step, to say what share of the limit a run reached.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from typing import Any

LAYERS = [(576, 576), (576, 192), (576, 1536), (1536, 576)]
SQUARES = [(size, size, size) for size in (1024, 2048, 4096)]  # the limit is the best of these: small ones stay in a cache
SHAPES = [*((m, k, n) for m in (512, 1024, 2048) for k, n in LAYERS), (512, 576, 49152), *SQUARES]


@dataclass(frozen=True)
class Shapes:
    """A decoder of the Llama family with LoRA of one rank on all its linear layers but the output layer."""

    layers: int
    hidden: int
    inner: int
    key_value: int  # width of keys, and of values
    vocabulary: int
    rank: int

    def linear(self) -> int:
        """Weights of the layers' matrices: q, o; k, v; gate, up, down."""
        return self.layers * (2 * self.hidden**2 + 2 * self.hidden * self.key_value + 3 * self.hidden * self.inner)

    def adapter(self) -> int:
        """Weights of A and B: rank x (inputs + outputs) of each matrix."""
        sides = 4 * self.hidden + 2 * (self.hidden + self.key_value) + 3 * (self.hidden + self.inner)
        return self.layers * self.rank * sides


def shapes_of(config: dict[str, Any], rank: int) -> Shapes:
    """From a checkpoint's config.json."""
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return Shapes(
        config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"],
        head * config["num_key_value_heads"], config["vocab_size"], rank,
    )  # fmt: skip


def lora_flops(shapes: Shapes, tokens: int, trained: int, squares: int) -> float:
    """Floating point operations that training these tokens once cannot do without; a multiplication and an addition are two.

    tokens: all, prompts too, no padding. trained: those with a loss. squares: the sum over rows of the squared length.
    Frozen matrices: 2 a weight and token forward, 2 for the gradient of their input; they have none of their own.
    The output layer: the same, on trained tokens alone. Adapter: 2 forward, 4 backward.
    Attention (scores and values): 4 x hidden x length^2 / 2 a layer forward, since half of the pairs are masked, and twice
    that backward.
    Recomputation, padding and logits of untrained tokens are work of an implementation's own choice, and not counted.
    """
    frozen = 4 * shapes.linear() * tokens
    output = 4 * shapes.hidden * shapes.vocabulary * trained
    adapter = 6 * shapes.adapter() * tokens
    attention = 3 * 2 * shapes.layers * shapes.hidden * squares
    return float(frozen + output + adapter + attention)


def gemm(m: int, k: int, n: int, dtype: Any, seconds: float) -> dict[str, float]:
    """GFLOP/s of [m, k] @ [k, n]^T's form in which a linear layer multiplies, repeated for about `seconds`."""
    import torch

    x, weight = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    for _ in range(3):
        torch.nn.functional.linear(x, weight)
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < until:
        started = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        times.append(time.perf_counter() - started)
    work = 2 * m * k * n / 1e9
    return {"best": work / min(times), "median": work / statistics.median(times)}


def bandwidth(seconds: float, size: int = 256 << 20) -> dict[str, float]:
    """GB/s of a copy: each byte read once and written once."""
    import torch

    source, target = torch.ones(size // 4), torch.empty(size // 4)
    times: list[float] = []
    until = time.perf_counter() + seconds
    target.copy_(source)
    while len(times) < 5 or time.perf_counter() < until:
        started = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - started)
    return {"best": 2 * size / 1e9 / min(times), "median": 2 * size / 1e9 / statistics.median(times)}


def measure(threads: int | None, seconds: float) -> dict[str, Any]:
    """seconds: for each shape and type."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    kinds = {"bf16": torch.bfloat16, "fp32": torch.float32}
    rates = {
        name: {"x".join(map(str, shape)): gemm(*shape, dtype, seconds) for shape in SHAPES} for name, dtype in kinds.items()
    }
    limit = {name: max(found["x".join(map(str, square))]["best"] for square in SQUARES) for name, found in rates.items()}
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gemm": rates,
        "limit": limit,
        "copy": bandwidth(2.0),
    }


def printed(found: dict[str, Any]) -> str:
    lines = [
        f"torch {found['torch']}, {found['threads']} threads",
        "| M x K x N | bf16 best | median | fp32 best | median |",
        "|---|---:|---:|---:|---:|",
    ]
    for shape, bf16 in found["gemm"]["bf16"].items():
        fp32 = found["gemm"]["fp32"][shape]
        lines.append(f"| {shape} | {bf16['best']:.0f} | {bf16['median']:.0f} | {fp32['best']:.0f} | {fp32['median']:.0f} |")
    lines.append(f"limit (best of the squares), GFLOP/s: bf16 {found['limit']['bf16']:.0f}, fp32 {found['limit']['fp32']:.0f}")
    lines.append(f"memory copy, GB/s: best {found['copy']['best']:.1f}, median {found['copy']['median']:.1f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the matrix product and memory rates of this machine.")
    parser.add_argument("--threads", type=int, default=None, help="default: torch's own choice")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each shape and type")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = measure(args.threads, args.seconds)
    print(json.dumps(found) if args.json else printed(found))


if __name__ == "__main__":
    main()
