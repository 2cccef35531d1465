"""A LoRA layer for plain linear layers that computes what peft's does in fewer passes over the activations.

y = x W^T + b + s (x A^T) B^T. The scale s goes to the narrow product, and the update is added by the product that makes it,
forward and backward. Shapes: M tokens, K inputs, N outputs, r the rank.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch.autograd.function import once_differentiable


class FusedLinear(Linear):
    """peft's layer, with its parameters and their names. What is not plain LoRA (DoRA, dropout, several adapters, a merged
    or switched-off one) is left to peft."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapter = None if args or kwargs or self.disable_adapters or self.merged else self._plain()
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        weight, bias = self.base_layer.weight, self.base_layer.bias
        if not (x.dtype == weight.dtype == a.dtype == b.dtype) or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        # Shaped out here: a view made inside the function could not be changed in place, which some models do.
        return LoraProduct.apply(x, weight, bias, a, b, self.scaling[adapter]).view(*x.shape[:-1], -1)

    def _plain(self) -> str | None:
        """The one active adapter, where nothing but A, B and a scale is to be applied on a frozen linear layer."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        base = self.base_layer
        if len(names) != 1 or type(base) is not torch.nn.Linear or any(p.requires_grad for p in base.parameters()):
            return None
        name = names[0]
        dropout = self.lora_dropout[name]
        silent = isinstance(dropout, torch.nn.Identity) or not self.training
        biased = self.lora_A[name].bias is not None or self.lora_B[name].bias is not None
        return name if silent and not biased and name not in self.lora_variant else None


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
