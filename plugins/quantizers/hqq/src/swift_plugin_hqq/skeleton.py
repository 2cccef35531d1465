"""Fills a model that was built without weights, on the meta device, from a folder that this quantizer wrote.

Parameters and persistent buffers come from the files. Other buffers (rotary frequencies) are in no file: the model's own
`initialize_weights` computes them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from hqq.core.quantize import HQQLinear
from swift_core.errors import RequestError
from torch import nn

from swift_plugin_hqq.folder import Header, read_tensors, saved_tensors
from swift_plugin_hqq.layers import Settings, replace, restore, saved_shapes


def is_skeleton(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def fill(model: Any, folder: Path, header: Header, device: torch.device) -> None:
    """Give every parameter and buffer its value, on `device`, in the dtype it was saved in.

    Raises RequestError for a tensor that the folder lacks, that the model lacks, or whose shape is not the model's.
    """
    recompute_buffers(model, folder, device)
    tensors = dict(read_tensors(folder))
    _fill_quantized(model, tensors, folder, header.settings, device)
    slots = {name: slot for name, slot in _slots(model) if name not in header.tied}
    _refuse_missing(folder, [name for name in slots if name not in tensors])
    for name, slot in slots.items():
        tensor = _checked(folder, name, tensors.pop(name), tuple(slot.shape)).to(device)
        _assign(model, name, nn.Parameter(tensor, tensor.is_floating_point()) if isinstance(slot, nn.Parameter) else tensor)
    if tensors:
        raise RequestError(f"model {folder} holds {len(tensors)} tensors that its config.json has no place for: {min(tensors)}")
    for further, name in header.tied.items():
        _assign(model, further, model.get_parameter(name))
    left = [name for name, tensor in _all_tensors(model) if tensor.is_meta]
    if left:
        raise RequestError(f"model {folder}: {type(model).__name__} keeps {left[0]} where hqq cannot restore it")


def _fill_quantized(
    model: nn.Module, tensors: dict[str, torch.Tensor], folder: Path, settings: Settings, device: torch.device
) -> None:
    """Replace the linear layers that the folder holds in HQQ form, taking their tensors out of `tensors`."""
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    for name, layer in linears.items():
        if not any(f"{name}.{part}" in tensors for part in ("W_q", "scale", "zero")):
            continue
        shapes = saved_shapes(layer, settings)
        _refuse_missing(folder, [f"{name}.{part}" for part in shapes if f"{name}.{part}" not in tensors])
        parts = {part: _checked(folder, f"{name}.{part}", tensors.pop(f"{name}.{part}"), shapes[part]) for part in shapes}
        replace(model, name, restore(layer, parts, settings, device))


def _refuse_missing(folder: Path, names: list[str]) -> None:
    if names:
        raise RequestError(f"model {folder} lacks {len(names)} of its tensors, {names[0]} first: is the folder complete?")


def recompute_buffers(model: Any, folder: Path, device: torch.device) -> None:
    """Compute the buffers that are in no file. Raises RequestError for one that the model does not compute itself.

    They are set to 0, then to 1 before; one that does not come out the same both times was not computed.
    """
    modules = dict(model.named_modules())
    slots = [
        (path, name)
        for path, module in modules.items()
        for name in sorted(module._non_persistent_buffers_set)
        if module._buffers.get(name) is not None and module._buffers[name].is_meta
    ]
    if not slots:
        return
    computed: list[list[torch.Tensor]] = []
    for start in (0, 1):
        for path, module in modules.items():
            module._is_hf_initialized = all(path != other for other, _ in slots)  # the library's mark for "leave it"
        for path, name in slots:
            modules[path]._buffers[name] = torch.full_like(modules[path]._buffers[name], start, device="cpu")
        if hasattr(model, "initialize_weights"):
            model.initialize_weights()
        computed.append([modules[path]._buffers[name] for path, name in slots])
    for module in modules.values():
        del module._is_hf_initialized
    for (path, name), first, second in zip(slots, *computed, strict=True):
        if not torch.equal(first, second):
            raise RequestError(f"model {folder}: {type(model).__name__} does not compute its buffer {path}.{name} again")
        modules[path]._buffers[name] = second.to(device)


def _slots(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers, those of quantized layers aside."""
    quantized = {path for path, module in model.named_modules() if isinstance(module, HQQLinear)}
    return [(name, tensor) for name, tensor in saved_tensors(model) if name.rpartition(".")[0] not in quantized]


def _all_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, buffers, and tensors that a module keeps as plain attributes."""
    yield from model.named_parameters()
    yield from model.named_buffers()
    for path, module in model.named_modules():
        yield from ((f"{path}.{name}", value) for name, value in vars(module).items() if isinstance(value, torch.Tensor))


def _checked(folder: Path, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if tuple(tensor.shape) != shape:
        found = tuple(tensor.shape)
        raise RequestError(f"model {folder}: {name} has shape {found}, and its config.json asks for {shape}")
    return tensor


def _assign(model: nn.Module, name: str, value: torch.Tensor) -> None:
    path, _, last = name.rpartition(".")
    setattr(model.get_submodule(path), last, value)
