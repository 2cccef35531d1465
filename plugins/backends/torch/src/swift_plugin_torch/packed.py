"""Linear layers on a CPU with weights in oneDNN's own layout: a product of few rows takes about two thirds of the time.

The packed weight stands in for the plain one, which is let go: memory stays the same, but for an output layer that shares its
weight with the embeddings, which need the plain one. `weight` can still be read, and `unpack` gives everything back as it was.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import nn

LEAST = 64  # rows and columns of a weight that is worth it
OWN = ("_packed", "_shared", "_reads", "_trained")
READS = 16  # of a packed weight by others, each of which unpacks a copy, after which it stays plain


class PackedLinear(nn.Linear):  # type: ignore[misc]
    """An nn.Linear after `_pack`: its class and its weight are changed in place, so that whoever holds the module keeps it."""

    _packed: Any  # the weight [out, in] in oneDNN's layout
    _shared: nn.Parameter | None  # the plain weight, where another module has it too
    _reads: int
    _trained: bool  # whether the plain weight wants a gradient

    @property
    def weight(self) -> torch.Tensor:
        """The weight in its plain layout; a copy, unless it is shared."""
        self._reads += 1
        return _unpack(self) if self._reads > READS else _plain(self)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.dtype != self._packed.dtype or not input.numel() or (torch.is_grad_enabled() and input.requires_grad):
            return nn.functional.linear(input, _plain(self), self.bias)
        made: torch.Tensor = torch.ops.mkldnn._linear_pointwise(input, self._packed, self.bias, "none", [], "")
        return made

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = _plain(self).detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Linear:
        """A plain layer: oneDNN's tensors cannot be copied so."""
        copied = nn.Linear.__new__(nn.Linear)
        memo[id(self)] = copied
        copied.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items() if name not in OWN})
        _put_back(copied, copy.deepcopy(self._shared, memo) if self._shared is not None else self._made())
        return copied

    def _made(self) -> nn.Parameter:
        with torch.inference_mode(False):  # a parameter as any other
            return nn.Parameter(self._packed.to_dense(), requires_grad=self._trained)


def possible(model: Any) -> bool:
    """Whether this machine packs weights of the model's precision."""
    device, dtype = model.device, model.dtype
    if device.type != "cpu" or not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


@torch.no_grad()  # type: ignore[untyped-decorator]
def pack(model: Any) -> int:
    """Pack the linear layers that gain by it. Returns the bytes that are kept twice."""
    if not possible(model):
        return 0
    uses = Counter(id(own) for module in model.modules() for own in module._parameters.values() if own is not None)
    twice, tried = 0, {}
    for module in model.modules():
        if type(module) is not nn.Linear or module.weight.dtype != model.dtype or min(module.weight.shape) < LEAST:
            continue
        shape = module.weight.shape
        if shape not in tried:
            tried[shape] = _exact(module.weight)
        if tried[shape]:
            twice += _pack(module, uses[id(module.weight)] > 1)
    return twice


@torch.no_grad()  # type: ignore[untyped-decorator]
def unpack(model: Any) -> None:
    """Every packed layer as it was."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            _unpack(module)


def _pack(module: nn.Linear, shared: bool) -> int:
    weight = module.weight
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    module.__class__ = PackedLinear
    del module._parameters["weight"]
    module.__dict__.update(_packed=packed, _shared=weight if shared else None, _reads=0, _trained=weight.requires_grad)
    return weight.nbytes if shared else 0


def _plain(module: PackedLinear) -> torch.Tensor:
    if module._shared is not None:
        return module._shared
    plain: torch.Tensor = module._packed.to_dense()
    return plain


def _unpack(module: PackedLinear) -> nn.Parameter:
    weight = module._shared if module._shared is not None else module._made()
    module.__class__ = nn.Linear
    for name in OWN:
        del module.__dict__[name]
    _put_back(module, weight)
    return weight


def _put_back(module: nn.Linear, weight: nn.Parameter) -> None:
    """The weight first, as nn.Linear has it: the order of a model's parameters is that of an optimizer's state."""
    others = dict(module._parameters)
    module._parameters.clear()
    module._parameters.update({"weight": weight} | others)


def _exact(weight: torch.Tensor) -> bool:
    """Whether a packed weight of this shape gives the plain one's products, on a few rows, and comes back as it went in."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    if not torch.equal(packed.to_dense(), weight):
        return False
    rows = torch.arange(3.0 * weight.shape[1]).sin().view(3, -1).to(weight.dtype)
    made = torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "").float()
    plain = nn.functional.linear(rows, weight).float()
    least = 1e-4 if weight.dtype == torch.float32 else 2e-2
    return bool((made - plain).abs().max() <= least * plain.abs().max().clamp_min(1e-6))
