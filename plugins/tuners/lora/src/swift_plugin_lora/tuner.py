"""LoRA through peft: adapters added, saved as peft saves them, loaded exactly, merged, switched off for the reference."""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, get_peft_model_state_dict
from safetensors.torch import load_file
from swift_core.errors import RequestError
from swift_core.types import ModelBundle
from swift_plugin_torch.lora_linear import FusedLinear

from swift_plugin_lora.config import LoraConfig

HEADED = ("sequence_classification", "token_classification", "reranker", "reward")
TASKS = {
    "causal_lm": "CAUSAL_LM", "sequence_classification": "SEQ_CLS", "reranker": "SEQ_CLS", "reward": "SEQ_CLS",
    "token_classification": "TOKEN_CLS", "embedding": "FEATURE_EXTRACTION", "seq2seq_lm": "SEQ_2_SEQ_LM",
}  # fmt: skip
"""What peft calls a model's task."""


class LoraTuned:
    """A TunedModel. `model` is the PeftModel."""

    def __init__(self, bundle: ModelBundle, config: LoraConfig) -> None:
        self.bundle, self.config = bundle, config
        options = read_options(Path(config.like)) if config.like else peft.LoraConfig(
            r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=choose(bundle, config),
            exclude_modules=config.exclude or None, use_rslora=config.rslora, use_dora=config.dora,
            init_lora_weights=True if config.init == "default" else config.init,
            modules_to_save=[*config.save_modules, *heads(bundle)] or None, task_type=task_of(bundle),
        )  # fmt: skip
        if not bundle.quantization:  # peft has layers of its own for quantized ones
            options._register_custom_module({torch.nn.Linear: FusedLinear})
        init = str(options.init_lora_weights)
        if bundle.quantization and init not in ("True", "gaussian"):
            raise RequestError(
                f"tuner.lora: init: {init} is made from the weights, which {bundle.quantization} has quantized; "
                "use default or gaussian"
            )
        # The same adapter whatever ran before, so that a resumed run begins alike.
        with torch.random.fork_rng(), warnings.catch_warnings():
            torch.manual_seed(torch.initial_seed())
            warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers, of no use to a user
            try:
                self.model = peft.get_peft_model(bundle.model, options)
            except (ValueError, TypeError) as err:
                raise RequestError(f"tuner.lora: {_explain(err, bundle, config)}") from err
        self.model.peft_config["default"].base_model_name_or_path = bundle.source
        # These hold a part of the base's weights in the adapter, so that the base is what the adapter began with.
        moved = init.startswith(("pissa", "olora", "corda"))
        if moved and _shared(bundle.model):
            raise RequestError(f"tuner.lora: init: {init} cannot take the output head, which is the embedding as well")
        self._start = {name: p.detach().clone() for name, p in self.trainable().items()} if moved else {}

    def trainable(self) -> dict[str, Any]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def param_groups(self, config: Any) -> list[dict[str, Any]]:
        """A and B apart where LoRA+ gives B another rate."""
        groups, rates = self._groups(), getattr(config, "rates", None)
        return self.bundle.parts.rated(groups, self.trainable(), rates) if rates and self.bundle.parts else groups

    def _groups(self) -> list[dict[str, Any]]:
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
        if not self._start:
            with self.model.disable_adapter():
                yield
            return
        parameters = dict(self.model.named_parameters())
        trained = {name: parameters[name].data for name in self._start}
        for name, start in self._start.items():
            parameters[name].data = start.to(parameters[name])
        try:
            yield
        finally:
            for name, values in trained.items():
                parameters[name].data = values

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
        own = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        for name in sorted(own.keys() ^ state.keys())[:1]:
            raise RequestError(f"{file} does not fit tuner.lora's options: {name} is in one of the two only")
        for name, tensor in state.items():
            if tensor.shape != own[name].shape:
                shapes = f"{name} has shape {tuple(tensor.shape)}, not {tuple(own[name].shape)}"
                raise RequestError(f"{file} does not fit tuner.lora's options: {shapes}")
        with (
            torch.no_grad()
        ):  # into the parameters themselves: peft's own loading renames keys, and loses some, for a few models
            for name, tensor in state.items():
                own[name].copy_(tensor)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All weights by the plain model's names, each with its update added, layer by layer; the model stays as it is."""
        model = self.model.get_base_model()
        tuned = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
        saved = {name for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}
        for name, tensor in model.state_dict().items():
            layer, _, rest = name.partition(".base_layer.")
            holder = next((holder for holder in saved if name.startswith(f"{holder}.")), None)
            if rest and layer in tuned:
                if rest == "weight":  # with its bias: an update may change both
                    merged = copy.deepcopy(tuned[layer])
                    merged.merge()
                    yield from ((f"{layer}.{key}", value) for key, value in merged.get_base_layer().state_dict().items())
            elif holder is not None:
                if name.startswith(start := f"{holder}.modules_to_save.default."):
                    yield f"{holder}.{name.removeprefix(start)}", tensor
            elif not any(name.startswith(f"{layer}.") for layer in tuned):
                yield name, tensor

    def merge(self) -> ModelBundle:
        """Add each update to its weight."""
        _untie(self.bundle.model)
        config = getattr(self.bundle.model, "config", None)
        tied = getattr(config, "tie_word_embeddings", None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            model = self.model.merge_and_unload()
        if tied:  # peft takes an encoder-decoder's, tied to the decoder's embedding and not to the encoder's, for untied
            config.tie_word_embeddings = tied
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        return replace(self.bundle, model=model)


def task_of(bundle: ModelBundle) -> str | None:
    """What peft calls the model's task; None for a model that takes no embeddings in place of ids, such as BLIP, or no ids, as
    those that write down what they hear: what peft wraps around a task names these arguments in each call, and the model would
    hand them on to its parts."""
    takes = inspect.signature(type(bundle.model).forward).parameters
    return TASKS.get(bundle.task) if {"inputs_embeds", "input_ids"} <= takes.keys() else None


def heads(bundle: ModelBundle) -> list[str]:
    """The head of a classifier or reward model, trained whole: it may be new."""
    named = (name for name, _ in bundle.model.named_children())
    return [name for name in named if bundle.task in HEADED and bundle.parts and "head" in bundle.parts.of(name)]


def choose(bundle: ModelBundle, config: LoraConfig) -> list[str] | str:
    """peft's `target_modules`: names, or a regex. Raises RequestError for a name that matches no layer of the model.

    `all-linear` of a multimodal model is its language model, unless `config.parts` says otherwise. Frozen parts get none.
    """
    model, parts = bundle.model, bundle.parts
    if parts is None:
        if config.parts:
            raise RequestError("tuner.lora.parts: this model's loader tells no parts; use targets")
        return _named(model, config)
    parts.check(config.parts, "tuner.lora.parts")
    whole = "all-linear" in config.targets
    wanted = set(config.parts) or ({"language"} if whole and {"vision", "audio"} & set(parts.names) else set())
    left_out = set(bundle.frozen) | ({"head"} if bundle.task in HEADED else set())
    chosen = _named(model, config)
    if not wanted and not left_out:
        return chosen
    layers = [name for name, module in model.named_modules() if name and not list(module.children())]
    found = [name for name in layers if _targeted(name, chosen)]
    kept = [name for name in found if (not wanted or parts.of(name) & wanted) and not parts.of(name) & left_out]
    if found and not kept:
        raise RequestError(
            f"tuner.lora: no layer of {config.targets} lies in the parts {', '.join(sorted(wanted) or parts.names)}"
            + (f" without {', '.join(bundle.frozen)}" if bundle.frozen else "")
        )
    return chosen if len(kept) == len(found) else kept


def _targeted(name: str, targets: list[str] | str) -> bool:
    """Whether peft takes a layer for these targets."""
    if isinstance(targets, str):
        return bool(re.fullmatch(targets, name))
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _named(model: torch.nn.Module, config: LoraConfig) -> list[str] | str:
    names = [name for name, _ in model.named_modules()]
    for option in ("targets", "exclude", "save_modules"):
        given = [entry for entry in getattr(config, option) if entry != "all-linear" and not entry.startswith("re:")]
        wrong = [entry for entry in given if not any(name == entry or name.endswith(f".{entry}") for name in names)]
        if wrong:
            raise RequestError(f"tuner.lora: {option} {wrong} match no layer of the model. {_linear_layers(model)}")
    if config.targets[0].startswith("re:"):
        return config.targets[0][3:]
    return [name for entry in config.targets for name in (all_linear(model) if entry == "all-linear" else [entry])]


def all_linear(model: torch.nn.Module) -> list[str]:
    """Full names of the model's linear layers, quantized ones too, without its output head.

    peft's own `all-linear` leaves out layers that a quantizer's class holds.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    mamba = getattr(getattr(model, "config", None), "model_type", None) in MAMBA
    found: dict[str, torch.nn.Module] = {}
    for name, module in model.named_modules():
        quantized = hasattr(module, "in_features") and hasattr(module, "out_features") and not list(module.children())
        linear = isinstance(module, torch.nn.Linear) or quantized or type(module).__name__ == "Conv1D"
        if linear and module is not head and not _of_its_own(module) and not (mamba and name.endswith("out_proj")):
            found[name] = module
    shared = _shared_by(found) | _embeddings_too(model, found)
    return [name for name in found if name not in shared]


MAMBA = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
"""Model types whose `out_proj` peft refuses: their kernels read its weight and go past the layer."""


def _of_its_own(module: torch.nn.Module) -> bool:
    """Whether a linear layer is a model's own kind that does something else, such as a router that returns two tensors."""
    if not isinstance(module, torch.nn.Linear) or type(module).forward is torch.nn.Linear.forward:
        return False
    if not type(module).__module__.startswith(("transformers.models.", "transformers_modules.")):
        return False  # a quantizer's
    try:
        with torch.no_grad():
            made = module(module.weight.new_zeros(1, module.in_features))
    except Exception:
        return True
    return not isinstance(made, torch.Tensor) or made.shape != (1, module.out_features)


def _shared_by(layers: dict[str, torch.nn.Module]) -> set[str]:
    """Names of layers whose weight another one has too: two updates of one weight could not be merged."""
    owners: dict[int, list[str]] = {}
    for name, module in layers.items():
        owners.setdefault(id(getattr(module, "weight", module)), []).append(name)
    return {name for names in owners.values() if len(names) > 1 for name in names}


def _embeddings_too(model: torch.nn.Module, layers: dict[str, torch.nn.Module]) -> set[str]:
    """Names of layers whose weight is an embedding's too: output heads that a model does not call its own, such as BLIP's."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    return {name for name, module in layers.items() if id(getattr(module, "weight", None)) in tables}


def read_options(folder: Path) -> peft.LoraConfig:
    """The options of an adapter that peft saved. Raises RequestError where they are not LoRA's."""
    try:
        options = peft.PeftConfig.from_pretrained(str(folder))
    except Exception as err:
        raise RequestError(f"tuner.lora.like: {folder} cannot be read: {' '.join(str(err).split())}") from err
    if not isinstance(options, peft.LoraConfig):
        raise RequestError(f"tuner.lora.like: {folder} holds a {options.peft_type.value} adapter, not a LoRA one")
    options.inference_mode = False
    return options


def _explain(err: ValueError, bundle: ModelBundle, config: LoraConfig) -> str:
    """peft's complaint in one line, with the layer endings that could be named."""
    if "not found" in str(err) or "No modules" in str(err):
        return f"targets {config.targets} match no layer of the model. {_linear_layers(bundle.model)}"
    return " ".join(str(err).split())


def _linear_layers(model: torch.nn.Module) -> str:
    linear = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if hasattr(module, "in_features")}
    return f"Its linear layers: {', '.join(sorted(linear))}"


def _untie(model: torch.nn.Module) -> None:
    """Give the output head a weight of its own where it shares one with the embedding and only one of them was tuned."""
    ends = _ends(model)
    if all(plain is tuned for plain, tuned in ends):
        return
    if _shared(model):
        ends[0][0].weight = torch.nn.Parameter(ends[0][0].weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False  # else saving or loading would tie them again


def _shared(model: torch.nn.Module) -> bool:
    """Whether the output head is tuned, and its weight is the embedding's too."""
    ends = _ends(model)
    return any(plain is not tuned for plain, tuned in ends) and ends[0][0].weight is ends[1][0].weight


def _ends(model: torch.nn.Module) -> list[tuple[torch.nn.Module, torch.nn.Module]]:
    """Output head and input embedding, each as it was and as it is tuned; empty for a model without one of them."""
    found = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("output", "input")]
    if None in found:
        return []
    return [(getattr(end, "original_module", getattr(end, "base_layer", end)), end) for end in found]
