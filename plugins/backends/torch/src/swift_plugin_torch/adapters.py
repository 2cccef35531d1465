"""Which adapter is on: loading and forgetting peft adapters, and choosing them for each row of a forward pass.

Plain LoRA adapters are mixed in one pass, by peft's `adapter_names`; rows with others get passes of their own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from swift_core.errors import RequestError

PART_OF_BASE = ("pissa", "olora", "corda")  # what begins like this takes a part of the base's weights into the adapter


class Adapters:
    """The adapters on a model. `model` is what forward passes go through; it becomes a PeftModel with the first one."""

    def __init__(self, model: Any, in_training: bool = False) -> None:
        self.model = model
        self.names: set[str] = set()
        self.only: str | None = None  # an adapter beside which there is no base
        # A model that comes tuned is served as it comes: its own adapter stays on where a request names none.
        self.own = str(model.active_adapter) if hasattr(model, "peft_config") else None
        if not in_training:
            round_tuned(model)
        self._leaving: set[str] = set()  # adapters that take no more requests
        self._alone: set[str] = set()  # adapters that no other row can share a pass with
        self._on: str | None = self.own
        self._off: Any = None  # the context in which all are off, while they are

    def check(self, name: str | None) -> None:
        """Raise RequestError where nothing can be computed under this name."""
        if name is not None and name not in self.names - self._leaving:
            raise self._unknown(name)
        if self.only and name != self.only:
            raise RequestError(f"adapter {self.only!r} holds a part of the base's weights; nothing is served beside it")

    def loaded(self, name: str | None) -> None:
        """Raise RequestError where an adapter was unloaded since its request was checked."""
        if name is not None and name not in self.names:
            raise self._unknown(name)

    def joinable(self, name: str | None) -> bool:
        """Whether rows of this adapter can share the cache of running rows: not where it brings states of its own."""
        config = self.model.peft_config[name or self.own] if (name or self.own) else None
        return not (config is not None and (config.is_prompt_learning or config.is_adaption_prompt))

    def groups(self, names: Sequence[str | None]) -> list[list[int]]:
        """Rows by their number, in groups that can be computed together."""
        found: dict[str | None, list[int]] = {}
        for row, name in enumerate(names):
            own = name or self.own
            found.setdefault(own if own in self._alone else None, []).append(row)
        return list(found.values())

    def passes(self, names: Sequence[str | None]) -> Callable[..., Any]:
        """What computes a forward pass over rows with these adapters: one of `groups`."""
        if not self.names:
            return self.model  # type: ignore[no-any-return]
        if len(set(names)) == 1:
            self.turn(names[0])
            return self.model  # type: ignore[no-any-return]
        self.turn(next(name for name in names if name))
        return partial(self.model, adapter_names=[name or self.own or "__base__" for name in names])

    def turn(self, name: str | None) -> None:
        """Turn one adapter on and all others off; None is the model as it came."""
        if not self.names:
            return
        wanted = name or self.own
        if self._off is not None and wanted is not None:
            self._off.__exit__(None, None, None)
            self._off = None
        if wanted is None and self._off is None:
            self._off = self.model.disable_adapter()
            self._off.__enter__()
        elif wanted is not None and self._on != wanted:
            self.model.set_adapter(wanted)
        self._on = wanted or self._on

    def rest(self) -> None:
        """Leave the model as others expect it: nothing switched off."""
        if self._off is not None:
            self._off.__exit__(None, None, None)
            self._off = None
        if self.own and self._on != self.own:
            self.model.set_adapter(self.own)
            self._on = self.own

    @contextmanager
    def on(self, name: str | None) -> Iterator[Any]:
        """The model with one adapter on."""
        self.check(name)
        with self.turned(name) as model:
            yield model

    @contextmanager
    def turned(self, name: str | None) -> Iterator[Any]:
        """The same for requests that were checked when they came."""
        self.turn(name)
        try:
            yield self.model
        finally:
            self.rest()

    def load(self, name: str, folder: Path) -> None:
        """Load a peft adapter's folder. Raises RequestError where it does not fit."""
        from peft import PeftConfig, PeftModel

        from swift_plugin_torch.lora_linear import FusedLinear

        if name == self.own:
            raise RequestError(f"adapter {name!r} is the model's own; give {folder} another name")
        self.rest()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", "Found missing adapter keys")  # a part left as it was begun: no adapter at all
                config = PeftConfig.from_pretrained(str(folder))
                if isinstance(self.model, PeftModel):
                    self.model.load_adapter(str(folder), adapter_name=name, autocast_adapter_dtype=False)
                else:
                    if plain_lora(config) and not getattr(self.model, "is_quantized", False):
                        config._register_custom_module({torch.nn.Linear: FusedLinear})
                    given = {"adapter_name": name, "config": config, "autocast_adapter_dtype": False}
                    self.model = PeftModel.from_pretrained(self.model, str(folder), **given).eval()
                    self._on = name
        except Exception as err:
            if isinstance(self.model, PeftModel) and name in self.model.peft_config and name not in self.names:
                self.model.delete_adapter(name)
            raise RequestError(f"adapter {folder} cannot be loaded: {' '.join(str(err).split())}") from err
        if takes_of_base(config):
            self.only = name
        if not plain_lora(config):
            self._alone.add(name)
        if self.own and not plain_lora(self.model.peft_config[self.own]):
            self._alone.add(self.own)
        self.names.add(name)

    def retire(self, name: str) -> None:
        """Take no more requests for an adapter. Raises RequestError where it is not loaded."""
        if name not in self.names - self._leaving:
            raise self._unknown(name)
        self._leaving.add(name)

    def _unknown(self, name: str) -> RequestError:
        loaded = ", ".join(sorted(self.names - self._leaving)) or "none"
        return RequestError(f"adapter {name!r} is not loaded; loaded: {loaded}")

    def unload(self, name: str) -> None:
        """Delete an adapter that was retired."""
        self.rest()
        if list(self.model.peft_config) == [name]:  # a model of peft's does not run without any
            base = self.model.base_model
            self.model = base.unload() if hasattr(base, "unload") else self.model.get_base_model()
        else:
            self.model.delete_adapter(name)
        self.names.discard(name)
        self._leaving.discard(name)
        self._alone.discard(name)
        if self._on == name:
            self._on = None
        if self.only == name:
            self.only = None


def takes_of_base(config: Any) -> bool:
    """Whether loading the adapter changes the base's weights."""
    return str(getattr(config, "init_lora_weights", None)).startswith(PART_OF_BASE)


def begun_as(folder: Path) -> bool:
    """`takes_of_base` of a folder; False where it has no readable config, which loading tells."""
    from peft import PeftConfig

    try:
        return takes_of_base(PeftConfig.from_pretrained(str(folder)))
    except Exception:  # told when it is loaded
        return False


def round_tuned(model: Any) -> None:
    """Bring what was tuned, and is read in fp32, to the precision that the model computes in, as training does."""
    dtype = model.dtype
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype == torch.float32 != dtype:
            parameter.data = parameter.data.to(dtype)


def plain_lora(config: Any) -> bool:
    """Whether an adapter is LoRA and nothing more, which peft mixes exactly."""
    more = ("use_dora", "modules_to_save", "trainable_token_indices", "alora_invocation_tokens", "target_parameters")
    special = ("use_qalora", "use_bdlora", "arrow_config", "velora_config", "kasa_config", "monteclora_config", "lora_bias")
    kind = getattr(config.peft_type, "value", config.peft_type)
    bias = getattr(config, "bias", "none")
    return kind == "LORA" and bias == "none" and not any(getattr(config, key, None) for key in (*more, *special))
