"""Options of the torch backend and of the transformers engine. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from swift_core.config import option


@dataclass
class TorchConfig:
    """`backend: {name: torch, precision: bf16}`."""

    device: str = option("auto", "auto, cpu, cuda or cuda:N; auto takes CUDA when it is there")
    precision: Literal["auto", "fp32", "bf16"] = option(
        "auto", "bf16 computes in bf16 and keeps what is trained in fp32; auto is bf16 on CUDA, fp32 on a CPU"
    )
    checkpointing: Literal["auto", "always", "never"] = option(
        "auto", "recompute activations in the backward pass: auto only where a pass would not fit into memory"
    )
    processes: int = option(1, "processes on this machine (--nproc)")
    threads: int | None = option(None, "CPU threads of each process; default: the cores, shared out")

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ValueError(f"processes must be at least 1, not {self.processes}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1, not {self.threads}")


@dataclass
class TransformersEngineConfig:
    """`engine: {name: transformers, batch_size: 16}`."""

    batch_size: int = option(32, "requests answered at once; others wait until one of them is finished")
    prefill_tokens: int = option(256, "tokens of prompts read in one pass, between two tokens of the answers that are running")
    prefix_mib: int = option(256, "memory for the states of earlier prompts, in MiB, used where a prompt begins alike; 0: none")
    packed: bool = option(
        True,
        "on a CPU: the weights of linear layers in oneDNN's layout, which is faster; an output layer that shares its weight "
        "with the embeddings is then in memory twice",
    )
    ngrams: int = option(0, "guess what follows from n-grams of prompt and answer, of so many tokens at most; 0: do not")
    draft: str | None = option(None, "guess what follows with a smaller model of the same vocabulary: a folder or an id")
    guesses: int = option(5, "tokens guessed for an answer at once, at most; fewer where many answers are running")
    processors: list[str] = option(
        [], "functions that change logits, as module:function or file.py:function: (token ids, logits [vocabulary]) -> logits"
    )

    @property
    def whole(self) -> int:
        """Sequences in a pass that has logits or states of every position, and rows that `generate` makes together."""
        return min(self.batch_size, 8)

    def __post_init__(self) -> None:
        for name in ("batch_size", "prefill_tokens", "guesses"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("prefix_mib", "ngrams"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        if self.ngrams and self.draft:
            raise ValueError("ngrams and draft both guess what follows; choose one")
        for name in self.processors:
            if not all(name.rpartition(":")[::2]):
                raise ValueError(f"processors: expected module:function or file.py:function, not {name!r}")
