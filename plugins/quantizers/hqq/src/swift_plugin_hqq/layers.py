"""Linear layers in HQQ form: which ones, from weights, and from saved tensors.

A weight W is held as groups of `bits`-bit integers, with a scale and a zero point a group: W = (W_q - zero) * scale.
Source: https://mobiusml.github.io/hqq_blog/; zero points by its half-quadratic solver, which needs no data.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from hqq.core import quantize as hqq
from swift_core.errors import RequestError, did_you_mean
from torch import nn

_PER_ITEM = {8: 1, 4: 2, 2: 4, 3: 10}  # weights that hqq packs into a byte, or at 3 bits into an int32


@dataclass(frozen=True)
class Settings:
    """How a model is quantized; part of a quantized folder's config.json."""

    bits: int
    group_size: int  # 0: one group a row or column
    axis: int
    skip: tuple[str, ...]  # patterns of names, see `matches`

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "skip": list(self.skip)}


class HQQLinear(hqq.HQQLinear):  # type: ignore[misc]  # peft goes by the name
    """hqq's layer, whose scales, zero points and bias follow `model.to(device or dtype)`, as those of other layers do."""

    bias: torch.Tensor | None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> HQQLinear:
        super()._apply(fn, recurse)
        if self.meta is not None:
            self.meta["scale"], self.meta["zero"] = fn(self.meta["scale"]), fn(self.meta["zero"])
            self.bias = None if self.bias is None else fn(self.bias)
            self.compute_dtype = self.meta["compute_dtype"] = self.meta["scale"].dtype
            self.device = str(self.meta["scale"].device)
        return self


def layer_tensors(layer: hqq.HQQLinear) -> dict[str, torch.Tensor]:
    """What is saved of a layer, and what `restore` takes."""
    found = {"W_q": layer.W_q.data, "scale": layer.meta["scale"], "zero": layer.meta["zero"], "bias": layer.bias}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def model_settings(model: nn.Module) -> Settings:
    """The settings of a quantized model's layers; `skip` names the linear layers that are not quantized.

    Raises RequestError where there is no such layer, or where they differ: then the model cannot be saved.
    """
    layers = [module for module in model.modules() if isinstance(module, hqq.HQQLinear)]
    if not layers:
        raise RequestError("quantizer hqq: the model has no layer that hqq quantized; there is nothing to save")
    sides = {(layer.meta["nbits"], layer.meta["axis"]) for layer in layers}
    sizes = {layer.meta["group_size"] for layer in layers}
    (bits, axis), size = next(iter(sides)), next(iter(sizes))
    whole = all(layer.meta["group_size"] == (layer.in_features if axis else layer.out_features) for layer in layers)
    if len(sides) > 1 or (len(sizes) > 1 and not whole):
        raise RequestError("quantizer hqq: the model's layers are quantized in different ways; such a model cannot be saved")
    left = tuple(name for name, module in model.named_modules() if type(module) is nn.Linear)
    return Settings(int(bits), 0 if len(sizes) > 1 else int(size), int(axis), left)


def linear_layers(model: nn.Module, settings: Settings) -> dict[str, nn.Linear]:
    """The layers to quantize, by name: every `nn.Linear` itself, subclasses and `skip` aside.

    Raises RequestError for a pattern that matches nothing, a layer whose shape does not divide, and a tied weight.
    """
    every = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    for pattern in settings.skip:
        if pattern != "lm_head" and not any(matches(name, pattern) for name in every):
            parts = {part for name in every for part in name.split(".")}
            raise RequestError(f"quantizer.hqq.skip: {pattern!r} matches no linear layer.{did_you_mean(pattern, parts)}")
    chosen = {name: layer for name, layer in every.items() if not any(matches(name, pattern) for pattern in settings.skip)}
    if not chosen:
        raise RequestError(f"quantizer hqq: {type(model).__name__} has no linear layer to quantize ({len(every)} in skip)")
    holders = [module for module in model.modules() if not isinstance(module, nn.Conv1d)]
    fused = sum(p.numel() for module in holders for p in module.parameters(recurse=False) if p.dim() == 3)
    if fused:
        warnings.warn(f"quantizer hqq: {fused} weights of fused experts are no linear layers, and stay as they are")
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, layer in chosen.items():
        others = [other for other in owners[id(layer.weight)] if other != f"{name}.weight"]
        if others:
            raise RequestError(f"quantizer.hqq.skip: {name} shares its weight with {others[0]}; add {name!r} to skip")
        check_shape(name, layer, settings)
    return chosen


def matches(name: str, pattern: str) -> bool:
    """Whether the pattern fits the name or a run of its dotted parts: `lm_head`, `mlp.*_proj`, `layers.0`, `visual`."""
    parts = name.split(".")
    runs = (".".join(parts[start:end]) for start in range(len(parts)) for end in range(start + 1, len(parts) + 1))
    return any(fnmatchcase(run, pattern) for run in runs)


def check_shape(name: str, layer: nn.Linear, settings: Settings) -> None:
    """Raise RequestError where groups would cross rows (or columns), or the packing would lose weights."""
    side, words = (layer.in_features, "inputs") if settings.axis else (layer.out_features, "outputs")
    if settings.group_size and side % settings.group_size:
        raise RequestError(
            f"quantizer.hqq.group_size: {settings.group_size} does not divide the {side} {words} of {name}; "
            f"choose a divisor, 0 for one group, or add {name!r} to skip"
        )
    rows = packed_rows(layer, settings)
    if settings.bits != 3 and rows % _PER_ITEM[settings.bits]:
        raise RequestError(
            f"quantizer.hqq.bits: {settings.bits} bits need groups in multiples of {_PER_ITEM[settings.bits]}, and {name} "
            f"has {rows}; choose another group_size or bits, or add {name!r} to skip"
        )


def packed_rows(layer: nn.Linear, settings: Settings) -> int:
    """Rows of the grouped weight matrix, which hqq packs several to an item."""
    size = group_size(layer, settings)
    return layer.in_features * layer.out_features // size if settings.axis else size


def group_size(layer: nn.Linear, settings: Settings) -> int:
    return settings.group_size or (layer.in_features if settings.axis else layer.out_features)


def quantize(layer: nn.Linear, settings: Settings, device: torch.device) -> HQQLinear:
    """A layer in HQQ form, computing in the dtype of its weights. The layer's own weights are given up."""
    # hqq clones the bias with its history: it would pass gradients on to the old one, and could not be copied.
    layer.requires_grad_(False)
    config = hqq.BaseQuantizeConfig(nbits=settings.bits, group_size=settings.group_size or None, axis=settings.axis)
    made = HQQLinear(layer, config, compute_dtype=layer.weight.dtype, device=str(device))
    # hqq solves under inference_mode, whose tensors cannot be changed in place or copied later on.
    made.meta["zero"] = made.meta["zero"].clone()
    return made.train(layer.training)  # type: ignore[no-any-return]


def restore(layer: nn.Linear, tensors: dict[str, torch.Tensor], settings: Settings, device: torch.device) -> HQQLinear:
    """A layer from the tensors that were saved of it, in the place of `layer`, which has the shape."""
    size, packing = group_size(layer, settings), hqq.Quantizer.bit_to_packing[settings.bits]
    made = HQQLinear(None, None, compute_dtype=tensors["scale"].dtype, device=str(device))
    made.load_state_dict(
        {
            **tensors,
            "stores_quant_config": True, "channel_wise": True, "optimize": True, "round_zero": settings.bits == 4,
            "nbits": settings.bits, "group_size": size, "axis": settings.axis, "view_as_float": False,
            "shape": torch.Size((layer.out_features, layer.in_features)), "packing": packing,
            "unpack_view_dtype": hqq.Quantizer.unpack_view_dtype[packing],
            "quant_scale": False, "quant_zero": False, "offload_meta": False,
        }
    )  # fmt: skip
    return made.train(layer.training)  # type: ignore[no-any-return]


def saved_shapes(layer: nn.Linear, settings: Settings) -> dict[str, tuple[int, ...]]:
    """The shapes that a layer's saved tensors must have."""
    size = group_size(layer, settings)
    groups = layer.in_features * layer.out_features // size
    packed = math.ceil(packed_rows(layer, settings) / _PER_ITEM[settings.bits])
    scale = (groups, 1) if settings.axis else (1, groups)
    shapes: dict[str, tuple[int, ...]] = {"W_q": (packed, size if settings.axis else groups), "scale": scale, "zero": scale}
    return {**shapes, "bias": (layer.out_features,)} if layer.bias is not None else shapes


def replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of the one that `name` leads to."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)
