"""What a forward pass gives a loss: log-probabilities of the trained tokens, or all logits where a loss asks for them.

The output layer runs on the trained positions only, in chunks, so that logits of size tokens x vocabulary never exist.
Shapes: B rows, T tokens, N trained positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from swift_core.types import Batch
from torch.autograd.function import once_differentiable

CHUNK = {"cpu": 256, "cuda": 1024}  # positions whose logits exist at once, in the precision of the weights
BLOCK = {"cpu": 16, "cuda": 1024}  # positions whose softmax is made at once, in float32: few stay in a CPU's cache

Within = Callable[[], AbstractContextManager[Any]]


class Outputs:
    """The result of one forward pass over a batch. within: the context that the pass was made in, see `TunedModel`."""

    def __init__(self, hidden: torch.Tensor, head: torch.nn.Linear | None, batch: Batch, within: Within = nullcontext) -> None:
        self._hidden, self._head, self._batch = hidden, head, batch  # without a head, `hidden` are the logits
        self._grad, self._within = torch.is_grad_enabled(), within

    @contextmanager
    def _as_passed(self) -> Iterator[None]:
        """What is computed later has a gradient only if the pass had, and the weights that the pass had."""
        with torch.set_grad_enabled(self._grad), self._within():
            yield

    @cached_property
    def logits(self) -> torch.Tensor:
        """[B, T, V], of every position. Prefer `logprobs`."""
        with self._as_passed():
            return self._hidden if self._head is None else self._head(self._hidden.to(self._head.weight.dtype))

    @cached_property
    def trained(self) -> torch.Tensor:
        """[B, T - 1] bool: where the label that follows has a weight."""
        return self._batch.weights[:, 1:] != 0

    def logprobs(self, temperature: float = 1.0) -> torch.Tensor:
        """log p(label | what stands before it) of the labels with a weight, row by row: [N] float32. temperature: what the
        logits are divided by."""
        labels, states = self._batch.labels[:, 1:][self.trained], self._states
        if self._head is None:
            return -torch.nn.functional.cross_entropy(states.float() / temperature, labels, reduction="none")
        head = self._head
        chunk = CHUNK[states.device.type]
        with self._as_passed():
            return LabelLogprobs.apply(states.to(head.weight.dtype), head.weight, head.bias, labels, chunk, temperature)

    def trained_logits(self, part: slice | None = None) -> torch.Tensor:
        """The logits that predict the labels with a weight, row by row: [N, V]; of `part` of them, for a loss that takes them
        piece by piece."""
        with self._as_passed():
            return self._logits(self._states if part is None else self._states[part])

    def entropies(self, temperature: float = 1.0) -> torch.Tensor:
        """The entropy of the distribution before each label with a weight, in nats, without a gradient: [N] float32."""
        states = self._states.detach()
        found = [states.new_empty(0, dtype=torch.float32)]
        with torch.no_grad(), self._within():
            for part in states.split(CHUNK[states.device.type]):
                logs = torch.log_softmax(self._logits(part).float() / temperature, -1)
                found.append(-(logs.exp() * logs).sum(-1))
        return torch.cat(found)

    @cached_property
    def _states(self) -> torch.Tensor:
        """What stands before the labels with a weight: [N, H], without a head [N, V]."""
        with torch.set_grad_enabled(self._grad):
            return self._hidden[:, :-1][self.trained]

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        return states if self._head is None else self._head(states.to(self._head.weight.dtype))


class LabelLogprobs(torch.autograd.Function):
    """log softmax((h W^T + b) / t)[label] for each row h: [N, H] x [V, H] -> [N] float32.

    The gradient of row n with respect to h is (onehot - softmax) W / t, whatever the loss does with the result; where only h
    has a gradient it is computed beside the forward pass, from the same logits. Else the logits are made again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        chunk: int,
        temperature: float = 1.0,
    ) -> torch.Tensor:
        result = states.new_empty(len(states), dtype=torch.float32)
        only_states = ctx.needs_input_grad[0] and not any(ctx.needs_input_grad[1:3])
        grad = torch.empty_like(states) if only_states else None
        for at in range(0, len(states), chunk):
            part = slice(at, at + chunk)
            logits = torch.nn.functional.linear(states[part], weight, bias)
            result[part] = _logprobs(logits, labels[part], temperature, into_gradient=grad is not None)
            if grad is not None:
                torch.mm(logits, weight, out=grad[part])
        ctx.chunk, ctx.temperature = chunk, temperature
        ctx.save_for_backward(states, weight, bias, labels, grad)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        states, weight, bias, labels, grad = ctx.saved_tensors
        upstream = upstream / ctx.temperature
        if grad is not None:
            return (grad.float() * upstream[:, None]).to(grad.dtype), *[None] * 5
        of_states = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        of_bias = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        for at in range(0, len(states), ctx.chunk):
            part = slice(at, at + ctx.chunk)
            of_logits = torch.nn.functional.linear(states[part], weight, bias).float()
            _logprobs(of_logits, labels[part], ctx.temperature, into_gradient=True)
            of_logits = of_logits.mul_(upstream[part, None]).to(weight.dtype)
            if of_states is not None:
                torch.mm(of_logits, weight, out=of_states[part])
            if of_weight is not None:
                of_weight += of_logits.t() @ states[part]
            if of_bias is not None:
                of_bias += of_logits.sum(0)
        return of_states, _like(of_weight, weight), _like(of_bias, bias), None, None, None


def _logprobs(logits: torch.Tensor, labels: torch.Tensor, temperature: float, into_gradient: bool) -> torch.Tensor:
    """log softmax(logits / temperature)[label] of each row, in float32: [N, V], [N] -> [N]. With `into_gradient` the logits
    become onehot(label) - softmax, the gradient of the result with respect to what the softmax is of."""
    result = labels.new_empty(len(labels), dtype=torch.float32)
    block = BLOCK[logits.device.type]
    for at in range(0, len(logits), block):
        part = slice(at, at + block)
        label = labels[part, None]
        values = logits[part].float() if logits.dtype != torch.float32 else logits[part].clone()
        values -= values.amax(-1, keepdim=True)
        if temperature != 1:
            values /= temperature
        own = values.gather(1, label)
        sums = values.exp_().sum(-1, keepdim=True)
        result[part] = (own - sums.log())[:, 0]
        if into_gradient:
            values /= -sums
            logits[part] = values.scatter_add_(1, label, torch.ones_like(own))
    return result


def _like(grad: torch.Tensor | None, parameter: torch.Tensor | None) -> torch.Tensor | None:
    return None if grad is None or parameter is None else grad.to(parameter.dtype)


class Open(torch.nn.Module):
    """Stands in for an output layer: gives what it is given, or `told` where that is set."""

    def __init__(self, head: torch.nn.Linear, told: torch.Tensor | None = None) -> None:
        super().__init__()
        self.told = told
        self.__dict__ |= {"weight": head.weight, "bias": head.bias}  # some models ask for its dtype; no parameters of this one

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states if self.told is None else self.told


def told(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a model whose output layer stays in its place says of a batch: its logits, or of a bare model its last states."""
    config = getattr(model, "config", None)
    keeps = config is None or getattr(config, "use_cache", None) is not None  # an encoder may take no such argument
    outputs = model(**inputs, **({"use_cache": False} if keeps else {}))
    logits = getattr(outputs, "logits", None)
    found: torch.Tensor = outputs.last_hidden_state if logits is None else logits
    return found


def plain_inputs(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a model takes for ids [B, T] alone: of an encoder-decoder, both halves read them."""
    both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return {"input_ids": ids, **({"decoder_input_ids": ids} if both else {})}


class Forward:
    """A model's forward pass with its output layer taken apart, where that can be done exactly. within: the context in which
    the model is what its role means."""

    def __init__(self, model: Any, within: Within = nullcontext) -> None:
        self.model, self.within = model, within
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.head = self._separable()

    def __call__(self, inputs: dict[str, torch.Tensor], batch: Batch) -> Outputs:
        with self.within():
            states = told(self.model, inputs) if self.head is None else self._states(inputs, Open(self.head))
        length = batch.labels.shape[1]
        if states.ndim == 3 and states.shape[1] > length:  # what it sees of a picture stands before the text, as in GIT
            states = states[:, -length:]
        return Outputs(states, self.head, batch, self.within)

    def _states(self, inputs: dict[str, torch.Tensor], instead: Open) -> torch.Tensor:
        """What the model would give its output layer; a constant that scales its logits scales this alike."""
        for holder, name in self.places:  # in place: a model's own setter may change more than the layer
            holder._modules[name] = instead
        try:
            states: torch.Tensor = self.model(**inputs, use_cache=False).logits
        finally:
            for holder, name in self.places:
                holder._modules[name] = self.head
        return states

    def _separable(self) -> torch.nn.Linear | None:
        """The output layer, if it is a plain linear one and the model at most scales its logits: tried on a few tokens, and on
        numbers in place of logits, as small logits do not show a cap on large ones."""
        head = getattr(self.base, "get_output_embeddings", lambda: None)()
        if type(head) is not torch.nn.Linear:
            return None
        self.head: torch.nn.Linear | None = head
        modules = self.base.modules()
        self.places = [(module, name) for module in modules for name, child in module._modules.items() if child is head]
        weight = head.weight
        inputs = plain_inputs(self.base, torch.arange(4, 12, device=weight.device)[None] % head.out_features)
        numbers = torch.linspace(1, 1000, 8 * head.in_features, device=weight.device, dtype=weight.dtype).view(1, 8, -1)
        numbers[..., ::2] *= -1  # of both signs, and none is 0, by which nothing can be divided
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                whole = self.model(**inputs, use_cache=False).logits.float()
                parts = head(self._states(inputs, Open(head)).to(weight.dtype)).float()
                scales = self._states(inputs, Open(head, numbers)).float() / numbers.float()
        except Exception:  # a model that cannot be called on token ids alone keeps its own way
            return None
        finally:
            self.model.train(training)
        same = whole.shape == parts.shape and float((whole - parts).abs().max()) <= 0.01 * float(whole.abs().max()) + 1e-6
        return head if same and float(scales.max() - scales.min()) <= 0.01 * float(scales.abs().max()) else None
