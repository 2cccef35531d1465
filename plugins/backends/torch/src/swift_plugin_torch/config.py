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
    processors: list[str] = option(
        [], "functions that change logits, as module:function or file.py:function: (token ids, logits [vocabulary]) -> logits"
    )

    @property
    def whole(self) -> int:
        """Sequences in a pass that has logits or states of every position, and rows that `generate` makes together."""
        return min(self.batch_size, 8)

    def __post_init__(self) -> None:
        for name in ("batch_size", "prefill_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.prefix_mib < 0:
            raise ValueError(f"prefix_mib must be at least 0, not {self.prefix_mib}")
        for name in self.processors:
            if not all(name.rpartition(":")[::2]):
                raise ValueError(f"processors: expected module:function or file.py:function, not {name!r}")
