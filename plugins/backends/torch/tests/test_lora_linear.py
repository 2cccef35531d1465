"""The fused layer against peft's own, on the same weights: values and every gradient."""

from __future__ import annotations

from collections.abc import Callable

import peft
import pytest
import torch
from peft.tuners.lora.layer import Linear
from swift_plugin_torch.lora_linear import FusedLinear, LoraProduct
from torch import Tensor, nn


def layers(bias: bool, dtype: torch.dtype, **options: object) -> tuple[Linear, FusedLinear]:
    torch.manual_seed(0)
    base = nn.Linear(24, 40, bias=bias).requires_grad_(False)
    made = []
    for kind in (Linear, FusedLinear):
        config = peft.LoraConfig(r=4, lora_alpha=12, init_lora_weights=False, **options)  # type: ignore[arg-type]
        torch.manual_seed(1)
        made.append(kind(base, "default", config, r=4, lora_alpha=12).to(dtype))
    return made[0], made[1]  # type: ignore[return-value]


def run(layer: Linear, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    upstream = torch.sin(torch.arange(y.numel(), dtype=torch.float32)).view_as(y).to(y.dtype)
    y.backward(upstream)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert layer.base_layer.weight.grad is None
    return [y.detach(), *(t.grad for t in (x, a, b) if t.grad is not None)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (1, 3, 2, 24)])
def test_values_and_gradients_are_pefts(bias: bool, dtype: torch.dtype, tolerance: float, shape: tuple[int, ...]) -> None:
    plain, fused = layers(bias, dtype)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    for one, other in zip(run(plain, x), run(fused, x), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert float((one - other).abs().max()) <= tolerance * float(one.abs().max())


def test_gradients_are_those_of_the_formula() -> None:
    x, a, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 6), (2, 6), (4, 2)))
    weight, bias = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, a, b: LoraProduct.apply(x, weight, bias, a, b, 1.5), (x, a, b))


def switched_off(layer: FusedLinear) -> None:
    layer.enable_adapters(False)


def trained_base(layer: FusedLinear) -> None:
    layer.base_layer.weight.requires_grad_(True)


@pytest.mark.parametrize("change", [switched_off, trained_base, FusedLinear.merge])
def test_what_is_not_plain_goes_pefts_way(change: Callable[[FusedLinear], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fused = layers(False, torch.float32)
    change(plain)  # type: ignore[arg-type]
    expected = plain(torch.ones(3, 24)).detach()
    if change is FusedLinear.merge:
        plain.unmerge()  # the two share a base
    change(fused)
    monkeypatch.setattr(LoraProduct, "apply", lambda *_: pytest.fail("the fused product was used"))
    assert torch.allclose(fused(torch.ones(3, 24)), expected, atol=1e-6)


def test_dropout_goes_pefts_way_in_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fused = layers(False, torch.float32, lora_dropout=0.5)
    used = []
    apply = LoraProduct.apply
    monkeypatch.setattr(LoraProduct, "apply", lambda *given: used.append(1) or apply(*given))
    fused.train()(torch.ones(3, 24))
    assert not used
    fused.eval()(torch.ones(3, 24))
    assert used


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_round_as_training_does(dtype: torch.dtype) -> None:
    """Without a gradient, and with rows of several adapters in one pass: to the last bit what the trained product gives."""
    _, fused = layers(True, dtype)
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False)
    fused.update_layer("other", 4, lora_alpha=6, config=config)
    fused.to(dtype)
    x = torch.randn((4, 5, 24), generator=torch.Generator().manual_seed(2)).to(dtype)
    names = ["default", "__base__", "other", "default"]
    trained = {"__base__": fused.base_layer(x)}
    for name in ("default", "other"):
        fused.set_adapter(name)
        trained[name] = fused(x.clone().requires_grad_())
        with torch.no_grad():
            assert torch.equal(fused(x), trained[name])
    with torch.no_grad():
        mixed = fused(x, adapter_names=names)
    for row, name in enumerate(names):
        assert torch.equal(mixed[row], trained[name][row]), name
    assert not torch.equal(trained["default"], trained["other"])
