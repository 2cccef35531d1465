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

    batch_size: int = option(8, "requests generated together")

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")
