"""Devices, precision and processes of a torch run, inside one rank."""

from __future__ import annotations

import os
import random
import re
import resource
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from swift_core.errors import RequestError
from swift_core.types import TunedModel

from swift_plugin_torch import pools
from swift_plugin_torch.config import TorchConfig
from swift_plugin_torch.memory import keep_few_primitives, keep_freed_pages
from swift_plugin_torch.parent import end_with_parent
from swift_plugin_torch.steps import TorchSteps


class TorchBackend:
    """One device a rank. With several ranks, gloo on CPUs and nccl on CUDA."""

    def __init__(self, config: TorchConfig) -> None:
        self.rank = int(os.environ.get("RANK", 0)) if config.processes > 1 else 0
        self.world = int(os.environ.get("WORLD_SIZE", 1)) if config.processes > 1 else 1
        self.device = choose_device(config.device, int(os.environ.get("LOCAL_RANK", 0)) if self.world > 1 else 0)
        self.checkpointing = config.checkpointing
        keep_freed_pages()
        keep_few_primitives()
        self.precision = choose_precision(config.precision, self.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world > 1:
            end_with_parent()
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    @property
    def pass_tokens(self) -> int | None:
        """Tokens from which on a longer forward pass gains nothing: a CPU's matrix products are at their full rate well below,
        and each token takes memory. A GPU has no such limit below its memory."""
        return 2048 if self.device.type == "cpu" else None

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def release_threads(self) -> None:
        """Called by a thread that has computed beside the main one, and waits now."""
        pools.release()

    def load_kwargs(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "device": self.device}

    def seed(self, seed: int) -> None:
        random.seed(seed)
        torch.manual_seed(seed)

    def prepare(self, roles: Mapping[str, TunedModel], optimizer: Callable[..., Any] | None, config: Any) -> TorchSteps:
        return TorchSteps(self, roles, optimizer, config)

    def describe(self) -> dict[str, Any]:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return {
            "device": str(self.device), "name": name, "precision": self.precision, "processes": self.world,
            "threads": torch.get_num_threads(), "torch": torch.__version__,
        }  # fmt: skip

    def peak_bytes(self) -> int:
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def total(self, values: list[float]) -> list[float]:
        """Sums over all ranks, in double precision. Collective."""
        if self.world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor]

    def all_true(self, flag: bool) -> bool:
        return self.total([float(not flag)])[0] == 0

    def close(self) -> None:
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


def choose_device(name: str, local_rank: int) -> torch.device:
    """The device a rank uses. Raises RequestError for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise RequestError(f"backend.torch.device: {name!r} is no device; use auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = device.index if device.index is not None else local_rank
        if index >= count:
            raise RequestError(f"backend.torch.device: {name!r} asks for GPU {index}, and {count} are available")
        return torch.device("cuda", index)
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """fp32 or bf16. Raises RequestError where the GPU lacks bf16."""
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    if name == "auto":
        return "bf16" if bf16 else "fp32"
    if name == "bf16" and device.type == "cuda" and not bf16:
        raise RequestError("backend.torch.precision: this GPU has no bf16; use fp32")
    return name
