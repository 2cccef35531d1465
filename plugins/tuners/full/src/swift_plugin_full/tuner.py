"""Chooses which of a model's own parameters are trained; saves the whole model as a folder that loads like any other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from swift_core.errors import RequestError
from swift_core.types import ModelBundle

from swift_plugin_full.config import FullConfig


class FullTuned:
    """A TunedModel. `model` is the bundle's model itself."""

    def __init__(self, bundle: ModelBundle, config: FullConfig) -> None:
        if bundle.quantization:
            raise RequestError(
                f"tuner.full: weights quantized by {bundle.quantization} cannot be trained; use an adapter such as lora"
            )
        self.bundle, self.model = bundle, bundle.model
        chosen = choose(of_parts(bundle, config.parts), config)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in chosen)
        self._original: dict[str, torch.Tensor] | None = None

    def trainable(self) -> dict[str, Any]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def param_groups(self, config: Any) -> list[dict[str, Any]]:
        """Vectors (norms and biases) without weight decay, as is usual."""
        matrices = [p for p in self.trainable().values() if p.ndim > 1]
        vectors = [p for p in self.trainable().values() if p.ndim <= 1]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        rates = getattr(config, "rates", None)
        return self.bundle.parts.rated(groups, self.trainable(), rates) if rates and self.bundle.parts else groups

    def make_optimizer(self, groups: list[dict[str, Any]]) -> None:
        return None

    def before_step(self, step: int) -> None: ...

    def after_step(self, step: int) -> None: ...

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The weights of the source, read again on first use and kept."""
        if self._original is None:
            self._original = _read(Path(self.bundle.source), set(self.trainable()), type(self.model))
        trained = {name: p.data for name, p in self.trainable().items()}
        for name, parameter in self.trainable().items():
            parameter.data = self._original[name].to(parameter)
        try:
            yield
        finally:
            for name, parameter in self.trainable().items():
                parameter.data = trained[name]

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.bundle.processor.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Raises RequestError when the folder lacks one of this model's weights."""
        state = _read(folder, {name for name, _ in self.model.named_parameters()}, type(self.model))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if state[name].shape != parameter.shape:
                    raise RequestError(
                        f"{folder}: {name} has shape {tuple(state[name].shape)}, the model {tuple(parameter.shape)}"
                    )
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(state[name].dtype)
                parameter.copy_(state[name])

    def merge(self) -> ModelBundle:
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        return self.bundle


def of_parts(bundle: ModelBundle, wanted: list[str]) -> list[tuple[str, torch.nn.Parameter]]:
    """The parameters of the wanted parts, by default of all, without the frozen ones."""
    named = list(bundle.model.named_parameters())
    if not bundle.parts:
        if wanted:
            raise RequestError("tuner.full.parts: this model's loader tells no parts; use only")
        return named
    bundle.parts.check(wanted, "tuner.full.parts")
    found = [(name, parameter, bundle.parts.of(name)) for name, parameter in named]
    return [(n, p) for n, p, parts in found if (not wanted or parts & set(wanted)) and not parts & set(bundle.frozen)]


def choose(parameters: list[tuple[str, torch.nn.Parameter]], config: FullConfig) -> set[str]:
    """Names of the parameters to train. Raises RequestError for an entry of `only` that matches none."""
    names = [name for name, _ in parameters]
    if not names:
        raise RequestError("tuner.full: nothing is trained: freeze leaves none of the parts")
    if config.only:
        chosen: set[str] = set()
        for entry in config.only:
            hit = {
                name for name in names if (re.search(entry[3:], name) if entry.startswith("re:") else name.startswith(entry))
            }
            if not hit:
                raise RequestError(
                    f"tuner.full: only: {entry!r} matches no parameter; they read like {names[0]!r}, {names[-1]!r}"
                )
            chosen |= hit
        parameters = [(name, p) for name, p in parameters if name in chosen]
    budget = config.share * sum(p.numel() for _, p in parameters)
    taken: set[str] = set()
    for name, parameter in reversed(parameters):
        if taken and parameter.numel() > budget:
            break
        taken.add(name)
        budget -= parameter.numel()
    return taken


def _read(folder: Path, names: set[str], kind: type) -> dict[str, torch.Tensor]:
    """The weights of `names` in a folder: those of its files, or where these name them otherwise, as a library's format for a
    model of several parts may, those of a model of that kind read from it. Raises RequestError where some are in neither."""
    state = {}
    for file in sorted(folder.glob("*.safetensors")):
        if file.name.startswith(("optimizer", "random-")):
            continue
        try:
            with safe_open(file, "pt") as opened:
                state |= {name: opened.get_tensor(name) for name in opened.keys() if name in names}  # noqa: SIM118
        except Exception as err:
            raise RequestError(f"{file} cannot be read: {' '.join(str(err).split())}") from err
    if state.keys() < names:
        state = _renamed(folder, names, kind) or state
    if absent := sorted(names - state.keys()):
        raise RequestError(f"{folder} lacks {len(absent)} of the model's weights, {absent[0]} first")
    return state


def _renamed(folder: Path, names: set[str], kind: type) -> dict[str, torch.Tensor]:
    """The folder's weights by their names in a model of that kind; nothing where it is no model's folder."""
    if not hasattr(kind, "from_pretrained") or not (folder / "config.json").is_file():
        return {}
    model, told = kind.from_pretrained(folder, dtype="auto", output_loading_info=True)
    made_up = {*told["missing_keys"], *(name for name, *_ in told["mismatched_keys"])}
    return {name: p.data for name, p in model.named_parameters() if name in names and name not in made_up}
