"""A LoRA layer for plain linear layers that computes what peft's does in fewer passes over the activations.

y = x W^T + b + s (x A^T) B^T. The scale s goes to the narrow product, and the update is added by the product that makes it,
forward and backward. The tuner trains with it and the engine answers with it: in half precisions both round alike. Shapes: M
tokens, K inputs, N outputs, r the rank.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch.autograd.function import once_differentiable

from swift_plugin_torch.packed import PackedLinear


class FusedLinear(Linear):
    """peft's layer, with its parameters and their names. What is not plain LoRA (DoRA, dropout, a merged or switched-off
    adapter) is left to peft."""

    def forward(self, x: torch.Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> torch.Tensor:
        """adapter_names: of each row of x its adapter, as peft mixes them; `__base__` is none."""
        own = {name for name in self.active_adapters if name in self.lora_A}
        chosen = own if adapter_names is None else set(adapter_names) - {"__base__"}
        if args or kwargs or not self._fuses(x, chosen) or (adapter_names is None and len(own) != 1):
            more = {} if adapter_names is None else {"adapter_names": adapter_names}
            return super().forward(x, *args, **more, **kwargs)
        if adapter_names is not None:
            return self._mixed(x, adapter_names)
        (name,) = own
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        if not torch.is_grad_enabled():
            return self._added(self.base_layer(x), x, name)
        # Shaped out here: a view made inside the function could not be changed in place, which some models do.
        weight, bias = self.base_layer.weight, self.base_layer.bias
        return LoraProduct.apply(x, weight, bias, a, b, self.scaling[name]).view(*x.shape[:-1], -1)

    def _fuses(self, x: torch.Tensor, names: set[str]) -> bool:
        """Whether nothing but A, B and a scale is to be applied, in one precision, on a frozen linear layer."""
        base = self.base_layer
        packed = isinstance(base, PackedLinear) and not torch.is_grad_enabled()
        if self.disable_adapters or self.merged or not (type(base) is torch.nn.Linear or packed):
            return False
        if any(p.requires_grad for p in base.parameters()) or torch.is_autocast_enabled(x.device.type):
            return False
        dtype = base._packed.dtype if packed else base.weight.dtype
        return x.dtype == dtype and all(self._plain(name, dtype) for name in names if name in self.lora_A)

    def _plain(self, name: str, dtype: torch.dtype) -> bool:
        a, b, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
        silent = isinstance(dropout, torch.nn.Identity) or not self.training
        alike = a.weight.dtype == b.weight.dtype == dtype
        return silent and alike and a.bias is None and b.bias is None and name not in self.lora_variant

    def _mixed(self, x: torch.Tensor, names: list[str]) -> torch.Tensor:
        y = self.base_layer(x)
        for name in {name for name in names if name in self.lora_A}:
            rows = torch.tensor([n for n, own in enumerate(names) if own == name], device=x.device)
            y[rows] = self._added(y[rows], x[rows], name)
        return y

    def _added(self, y: torch.Tensor, x: torch.Tensor, name: str) -> torch.Tensor:
        """y with an adapter's update, as `LoraProduct` makes it. y is changed."""
        narrow = (x.reshape(-1, x.shape[-1]) @ self.lora_A[name].weight.t()).mul_(self.scaling[name])
        return y.reshape(-1, y.shape[-1]).addmm_(narrow, self.lora_B[name].weight.t()).view(y.shape)


class LoraProduct(torch.autograd.Function):
    """[..., K] -> [M, N], with gradients of x [M, K], A [r, K] and B [N, r]; W [N, K] and b [N] are frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        narrow = (rows @ a.t()).mul_(scale)
        y = torch.nn.functional.linear(rows, weight, bias).addmm_(narrow, b.t())
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(rows, narrow, weight, a, b)
            ctx.scale, ctx.shape = scale, x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, narrow, weight, a, b = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        of_narrow = (grad @ b).mul_(ctx.scale)
        of_x = (grad @ weight).addmm_(of_narrow, a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        of_a = of_narrow.t() @ rows if ctx.needs_input_grad[3] else None
        of_b = (narrow.t() @ grad).t() if ctx.needs_input_grad[4] else None
        return of_x, None, None, of_a, of_b, None
