"""Memory of a training pass: what it will take, what there is, and how the allocator keeps what is freed.

Recomputing activations costs a third more arithmetic, so it is chosen only where a pass would not fit: the bytes that
autograd keeps for a token are measured on a short pass, and compared with what is free before each pass.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from swift_plugin_torch.head import plain_inputs

MARGIN = 1.5  # kept bytes grow faster than the tokens: attention's probabilities, buffers of the backward pass
PROBE = 64  # tokens of the pass that is measured
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
PRIMITIVES = 256  # compiled products that oneDNN keeps; a pass over flat rows of a new length needs about 150 new ones


def keep_freed_pages() -> None:
    """Let glibc's allocator keep freed memory, up to 1 GiB at once, instead of giving it back and faulting it in again, page
    by page, in each step. Elsewhere nothing is done."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
            libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)


def keep_few_primitives() -> None:
    """Let oneDNN forget compiled products beyond a pass's worth. It keeps 1,024 by default, a megabyte each with its buffers,
    and passes seldom have the same length again. To be called before the first product; what the user has set stands."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PRIMITIVES))


def kept_bytes(model: Any, device: torch.device) -> float | None:
    """Bytes that autograd keeps for each token of a training pass, of an encoder-decoder for one of each half; None where the
    model takes no plain tokens."""
    seen: dict[int, int] = {}
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    training = model.training
    model.train()
    try:
        devices, hooks = [device] if device.type == "cuda" else [], torch.autograd.graph.saved_tensors_hooks
        with torch.random.fork_rng(devices), hooks(count, lambda tensor: tensor):
            outputs = model(**plain_inputs(model, torch.arange(4, 4 + PROBE, device=device)[None]), use_cache=False)
        del outputs
    except Exception:
        return None
    finally:
        model.train(training)
    return sum(seen.values()) / PROBE


def free_bytes(device: torch.device) -> int:
    """What may still be allocated: of the device, or of the machine and the control group that the process is in."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    free = []
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free.append(int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024)
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())  # "max" where there is none
        free.append(limit - int((group / "memory.current").read_text()))
    return min(free, default=sys.maxsize)


class Checkpointing:
    """Whether a pass recomputes its activations layer by layer (Chen et al. 2016): `auto`, `always` or `never`."""

    def __init__(self, base: Any, mode: str, device: torch.device) -> None:
        self.base, self.mode, self.device, self.on, self.told = base, mode, device, False, False
        self.able = bool(getattr(base, "supports_gradient_checkpointing", False))
        self.bytes = kept_bytes(base, device) if self.able and mode == "auto" else None

    def prepare(self, tokens: int) -> None:
        """Before a training pass over so many tokens, padding included."""
        wanted = self.mode == "always"
        if self.bytes is not None:
            need, free = tokens * self.bytes * MARGIN, free_bytes(self.device)
            wanted = need > free
            if wanted and not self.told:
                self.told = True
                warnings.warn(
                    f"a pass over {tokens} tokens needs about {need / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free: "
                    "activations are recomputed where that is so, at a third more arithmetic "
                    "(backend.checkpointing=never forbids it)",
                    stacklevel=2,
                )
        if not self.able or wanted == self.on:
            return
        if wanted:
            self.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            self.base.gradient_checkpointing_disable()
        self.on = wanted
