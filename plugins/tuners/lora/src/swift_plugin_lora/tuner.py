"""LoRA through peft: adapters added, saved as peft saves them, loaded exactly, merged, switched off for the reference."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from swift_core.errors import RequestError
from swift_core.types import ModelBundle

from swift_plugin_lora.config import LoraConfig


class LoraTuned:
    """A TunedModel. `model` is the PeftModel."""

    def __init__(self, bundle: ModelBundle, config: LoraConfig) -> None:
        self.bundle, self.config = bundle, config
        targets: Any = config.targets
        if config.targets == ["all-linear"]:
            targets = all_linear(bundle.model)
        elif len(config.targets) == 1 and config.targets[0].startswith("re:"):
            targets = config.targets[0][3:]
        options = peft.LoraConfig(
            r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets,
            exclude_modules=config.exclude or None, use_rslora=config.rslora, use_dora=config.dora,
            init_lora_weights=True if config.init == "default" else config.init,
            modules_to_save=config.save_modules or None, task_type="CAUSAL_LM",
        )  # fmt: skip
        # The same adapter whatever ran before, so that a resumed run begins alike.
        with torch.random.fork_rng(), warnings.catch_warnings():
            torch.manual_seed(torch.initial_seed())
            warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers, of no use to a user
            try:
                self.model = peft.get_peft_model(bundle.model, options)
            except ValueError as err:
                raise RequestError(f"tuner.lora: {_explain(err, bundle, config)}") from err
        self.model.peft_config["default"].base_model_name_or_path = bundle.source

    def trainable(self) -> dict[str, Any]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def param_groups(self, config: Any) -> list[dict[str, Any]]:
        """A and B apart where LoRA+ gives B another rate."""
        if self.config.plus_ratio == 1.0:
            return [{"params": list(self.trainable().values())}]
        faster = [p for name, p in self.trainable().items() if "lora_B" in name or "lora_embedding_B" in name]
        chosen = {id(p) for p in faster}
        rest = [p for p in self.trainable().values() if id(p) not in chosen]
        return [{"params": rest}, {"params": faster, "lr_scale": self.config.plus_ratio}]

    def make_optimizer(self, groups: list[dict[str, Any]]) -> None:
        return None

    def before_step(self, step: int) -> None: ...

    def after_step(self, step: int) -> None: ...

    @contextmanager
    def disabled(self) -> Iterator[None]:
        with self.model.disable_adapter():
            yield

    def save(self, folder: Path) -> None:
        """`adapter_model.safetensors` and `adapter_config.json`, as peft reads them."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about a base config on the hub, which is never asked
            self.model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # a model card of blanks

    def load(self, folder: Path) -> None:
        """Raises RequestError when the file is missing, damaged, or was made with other options."""
        file = folder / "adapter_model.safetensors"
        try:
            state = load_file(file)
        except Exception as err:
            raise RequestError(f"{file} cannot be read: {' '.join(str(err).split())}") from err
        try:
            result = set_peft_model_state_dict(self.model, state)
        except RuntimeError as err:
            raise RequestError(f"{file} does not fit tuner.lora's options: {str(err).splitlines()[-1].strip()}") from err
        absent = [name for name in result.missing_keys if "lora_" in name]
        if result.unexpected_keys or absent:
            name = (list(result.unexpected_keys) + absent)[0]
            raise RequestError(f"{file} does not fit tuner.lora's options: {name} is in one of the two only")

    def merge(self) -> ModelBundle:
        """Add each update to its weight."""
        model = self.model.merge_and_unload()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        bundle = self.bundle
        return ModelBundle(model, bundle.processor, bundle.source, bundle.architecture, bundle.template, bundle.quantization)


def all_linear(model: torch.nn.Module) -> list[str]:
    """Full names of the model's linear layers, quantized ones too, without its output head.

    peft's own `all-linear` leaves out layers that a quantizer's class holds.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = []
    for name, module in model.named_modules():
        quantized = hasattr(module, "in_features") and hasattr(module, "out_features") and not list(module.children())
        if module is not head and (isinstance(module, torch.nn.Linear) or quantized or type(module).__name__ == "Conv1D"):
            found.append(name)
    return found


def _explain(err: ValueError, bundle: ModelBundle, config: LoraConfig) -> str:
    """peft's complaint in one line, with the layer endings that could be named."""
    linear = {name.rsplit(".", 1)[-1] for name, module in bundle.model.named_modules() if hasattr(module, "in_features")}
    if "not found" in str(err) or "No modules" in str(err):
        return f"targets {config.targets} match no layer of the model. Its linear layers: {', '.join(sorted(linear))}"
    return " ".join(str(err).split())
