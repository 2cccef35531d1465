"""Recomputing activations: chosen by memory, and without effect on a step's numbers."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from swift_core.types import ModelBundle, Sample
from swift_plugin_supervised.loop import cross_entropy
from swift_plugin_torch import memory
from swift_plugin_torch.backend import TorchBackend
from swift_plugin_torch.config import TorchConfig
from swift_plugin_transformers.testing import save_tiny

CPU = torch.device("cpu")
CONFIG = SimpleNamespace(learning_rate=1e-3, weight_decay=0.0, betas=[0.9, 0.999])


class Tuned:
    def __init__(self, model: Any) -> None:
        self.model = model

    def param_groups(self, config: Any) -> list[dict[str, Any]]:
        return [{"params": list(self.model.parameters())}]

    def make_optimizer(self, groups: Any) -> None: ...


def steps(bundle: ModelBundle, mode: str) -> Any:
    backend = TorchBackend(TorchConfig(device="cpu", checkpointing=mode))  # type: ignore[arg-type]
    return backend.prepare({"policy": Tuned(bundle.model)}, None, CONFIG)  # type: ignore[dict-item]


def gradients(bundle: ModelBundle, mode: str) -> tuple[float, list[torch.Tensor]]:
    made = steps(bundle, mode)
    batch = bundle.template.collate([Sample([5, 6, 7, 8, 9] * 8, [1.0] * 40)])  # type: ignore[union-attr]
    loss = made.forward_backward([batch], cross_entropy).loss
    found = [parameter.grad.clone() for parameter in bundle.model.parameters()]
    bundle.model.zero_grad()
    return loss, found


def test_recomputing_changes_no_number(tiny_bundle: ModelBundle) -> None:
    plain, again = gradients(tiny_bundle, "never"), gradients(tiny_bundle, "always")
    assert tiny_bundle.model.is_gradient_checkpointing
    assert plain[0] == again[0]
    assert all(torch.equal(one, other) for one, other in zip(plain[1], again[1], strict=True))


def test_auto_goes_by_what_is_free(tiny_bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    made = steps(tiny_bundle, "auto").checkpointing
    need = 100 * made.bytes * memory.MARGIN
    told = []
    for free, on in ((need + 1, False), (need - 1, True), (need + 1, False), (need - 1, True)):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            made.prepare(100)
        told.append(sum("a pass over 100 tokens" in str(warning.message) for warning in caught))
        assert (made.on, tiny_bundle.model.is_gradient_checkpointing) == (on, on)
    assert told == [0, 1, 0, 0]  # once


def test_kept_bytes_grow_with_the_model_and_not_with_its_weights(tiny_bundle: ModelBundle, tmp_path: Path) -> None:
    from swift_plugin_transformers.config import TransformersConfig
    from swift_plugin_transformers.loading import load_model

    def measured(**shape: Any) -> float:
        folder = save_tiny(tmp_path / str(shape), **shape)
        found = memory.kept_bytes(load_model(str(folder), None, {}, TransformersConfig()).model, CPU)
        assert found is not None
        return found

    two, four, wide = measured(), measured(num_hidden_layers=4), measured(max_position_embeddings=4096)
    # A layer keeps at least its inputs, q, k, v, the attention's result and three values of the feed-forward width.
    assert (four - two) / 2 > 4 * (64 * 4 + 128 * 3)
    assert four / two < 2
    assert wide == two
    frozen = tiny_bundle.model.requires_grad_(False)
    assert memory.kept_bytes(frozen, CPU) == 0
    assert memory.kept_bytes(torch.nn.Linear(2, 2), CPU) is None  # takes no tokens


def test_free_bytes_is_below_the_machine_s_memory() -> None:
    free = memory.free_bytes(CPU)
    lines = Path("/proc/meminfo").read_text().splitlines()
    assert 0 < free <= int(lines[0].split()[1]) * 1024
