"""The arithmetic of an optimizer step: forward, backward, the sum over ranks, the update, and its state on disk.

Gradients are those of the mean loss over the weight of the whole step, all microbatches and ranks together. They are summed
over ranks once a step, explicitly: ranks may hold different numbers of microbatches, or none.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from swift_core.errors import RequestError, RunError
from swift_core.types import Batch, LossFn, StepResult, TunedModel

from swift_plugin_torch.head import Forward, Outputs
from swift_plugin_torch.memory import Checkpointing

if TYPE_CHECKING:
    from swift_plugin_torch.backend import TorchBackend


MASTER = "master"  # the fp32 copy of a parameter, beside the optimizer's own state


class TorchSteps:
    """Steps on prepared models. `config` gives learning_rate, weight_decay and betas."""

    def __init__(
        self, backend: TorchBackend, roles: Mapping[str, TunedModel], optimizer: Callable[..., Any] | None, config: Any
    ) -> None:
        self.backend, self.roles, self.policy = backend, roles, roles["policy"]
        for tuned in roles.values():
            tuned.model.to(backend.device)
        groups = [{"lr_scale": 1.0, "weight_decay": config.weight_decay, **group} for group in self.policy.param_groups(config)]
        groups = [{**group, "params": [p for p in group["params"] if p.requires_grad]} for group in groups]
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        if not self.parameters:
            raise RequestError("nothing is trained: the tuner leaves no parameter with a gradient")
        groups = self._with_masters(groups)
        self.frozen_statistics = frozen_statistics(self.policy.model)
        self.passes = {role: Forward(tuned.model, getattr(tuned, "within", nullcontext)) for role, tuned in roles.items()}
        self.checkpointing = Checkpointing(self.passes["policy"].base, backend.checkpointing, backend.device)
        if optimizer is not None:  # asked for by name: it goes before the tuner's own
            self.optimizer = optimizer(groups, config.learning_rate, config.weight_decay)
        else:
            self.optimizer = self.policy.make_optimizer(groups)
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=tuple(config.betas), fused=True)

    def forward_backward(self, microbatches: Sequence[Batch], loss_fn: LossFn) -> StepResult:
        counts = [sum(getattr(batch, name) for batch in microbatches) for name in ("weight", "tokens", "trained_tokens")]
        weight, tokens, trained = self.backend.total(counts)
        scale = 1.0 / weight if weight else 0.0
        self.policy.model.train()
        for module in self.frozen_statistics:
            module.eval()
        loss = 0.0
        for batch in microbatches:
            read = batch.inputs.get("input_ids", batch.labels)  # more than the labels, in an encoder
            self.checkpointing.prepare(max(batch.labels.numel(), read.numel()))
            batch_loss = loss_fn(*self._forward("policy", batch))
            (batch_loss * scale).backward()
            self._gather_gradients()
            loss += float(batch_loss.detach())
        self._sum_gradients()
        return StepResult(self.backend.total([loss])[0] * scale, weight, int(tokens), int(trained))

    def optimizer_step(self, learning_rate: float, clip: float | None) -> float:
        norm = float(torch.nn.utils.clip_grad_norm_(self.masters, clip if clip else math.inf))
        if not math.isfinite(norm):
            raise RunError(f"the gradient is {norm}: lower trainer.learning_rate, or use backend.precision=fp32")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._spread_masters()
        return norm

    def forward(self, role: str, batch: Batch) -> Any:
        self.roles[role].model.eval()
        with torch.no_grad():
            return self._forward(role, batch)[0]

    def evaluate(self, batches: Iterable[Batch], loss_fn: LossFn) -> StepResult:
        self.policy.model.eval()
        sums = [0.0, 0.0, 0.0, 0.0]
        with torch.no_grad():
            for batch in batches:
                loss = float(loss_fn(*self._forward("policy", batch)))
                sums = [a + b for a, b in zip(sums, (loss, batch.weight, batch.tokens, batch.trained_tokens), strict=True)]
        loss, weight, tokens, trained = self.backend.total(sums)
        return StepResult(loss / weight if weight else math.nan, weight, int(tokens), int(trained))

    def full_weights(self, role: str) -> Iterator[tuple[str, torch.Tensor]]:
        tuned = self.roles[role]
        yield from tuned.weights() if hasattr(tuned, "weights") else tuned.model.state_dict().items()

    def save(self, folder: Path) -> None:
        """`optimizer.safetensors` by rank 0, and each rank's random generators."""
        if self.backend.rank == 0:
            tensors, scalars = {}, {}
            for number, parameter in enumerate(self.masters):
                if parameter is not self.parameters[number]:
                    tensors[f"{number}.{MASTER}"] = parameter.detach()
                for key, value in self.optimizer.state.get(parameter, {}).items():
                    if isinstance(value, torch.Tensor):
                        tensors[f"{number}.{key}"] = value.contiguous()
                    else:
                        scalars[f"{number}.{key}"] = value
            save_file(tensors, folder / "optimizer.safetensors", metadata={"scalars": json.dumps(scalars)})
        generators = {"torch": torch.get_rng_state()}
        if self.backend.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.backend.device)
        python = json.dumps(random.getstate())
        save_file(generators, folder / f"random-{self.backend.rank}.safetensors", metadata={"python": python})

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote. Raises RequestError when a file is missing, or made by another number of ranks."""
        from safetensors import safe_open

        state, mine = None, folder / f"random-{self.backend.rank}.safetensors"
        try:
            with safe_open(folder / "optimizer.safetensors", "pt") as file:
                scalars = json.loads(file.metadata().get("scalars", "{}"))
            state = load_file(folder / "optimizer.safetensors")
            generators = load_file(mine)
            with safe_open(mine, "pt") as file:
                version, internal, gauss = json.loads(file.metadata()["python"])
        except Exception as err:
            what = "optimizer.safetensors" if state is None else mine.name
            raise RequestError(
                f"checkpoint {folder} cannot be resumed: {what}: {' '.join(str(err).split())}. "
                "Name an earlier one: trainer.resume=FOLDER"
            ) from err
        # A fused optimizer counts its steps on the device, any other on the CPU.
        fused = {id(p) for group in self.optimizer.param_groups if group.get("fused") for p in group["params"]}
        for key, value in (state | scalars).items():
            number, _, name = key.partition(".")
            parameter = self.masters[int(number)]
            if name == MASTER:
                parameter.data.copy_(value)
                continue
            if isinstance(value, torch.Tensor) and (value.ndim or id(parameter) in fused):
                value = value.to(parameter.device)
            self.optimizer.state[parameter][name] = value
        self._spread_masters()
        random.setstate((version, tuple(internal), gauss))
        torch.set_rng_state(generators["torch"])
        if "cuda" in generators:
            torch.cuda.set_rng_state(generators["cuda"], self.backend.device)

    def _forward(self, role: str, batch: Batch) -> tuple[Outputs, Batch]:
        """Outputs and the batch, both on the device."""
        device = self.backend.device
        inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
        batch.labels, batch.weights = batch.labels.to(device), batch.weights.to(device)
        if batch.sample_of is not None:
            batch.sample_of = batch.sample_of.to(device)
        return self.passes[role](inputs, batch), batch

    def _with_masters(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The groups that the optimizer takes. A parameter is computed with in the backend's precision; below fp32 its values,
        its gradient's sum over microbatches and its optimizer state are kept by a master in fp32, as an update is mostly
        smaller than a step of bf16."""
        dtype = self.backend.dtype
        masters: dict[int, torch.Tensor] = {}
        for parameter in self.parameters:
            master = parameter
            if dtype != torch.float32:
                master = torch.nn.Parameter(parameter.detach().float().clone())
                parameter.data = parameter.data.to(dtype)
            elif parameter.dtype != dtype:
                parameter.data = parameter.data.float()
            masters[id(parameter)] = master
        self.masters = [masters[id(parameter)] for parameter in self.parameters]
        return [{**group, "params": [masters[id(p)] for p in group["params"]]} for group in groups]

    def _gather_gradients(self) -> None:
        """Add the gradients of a microbatch to the masters'."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter and parameter.grad is not None:
                master.grad = parameter.grad.float() if master.grad is None else master.grad.add_(parameter.grad)
                parameter.grad = None

    def _spread_masters(self) -> None:
        """Round the masters' values into the parameters that are computed with."""
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                if master is not parameter:
                    parameter.copy_(master)

    def _sum_gradients(self) -> None:
        if self.backend.world == 1:
            return
        for parameter in self.masters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([parameter.grad.flatten() for parameter in self.masters])
        dist.all_reduce(flat)
        offset = 0
        for parameter in self.masters:
            parameter.grad.copy_(flat[offset : offset + parameter.numel()].view_as(parameter))
            offset += parameter.numel()


def frozen_statistics(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Layers that keep running statistics of what passes through, such as BatchNorm, of which nothing is trained. In a training
    pass they stay as in inference: their statistics belong to the frozen weights, and no adapter would carry them."""
    found = (module for module in model.modules() if getattr(module, "track_running_stats", False))
    return [module for module in found if not any(parameter.requires_grad for parameter in module.parameters())]
