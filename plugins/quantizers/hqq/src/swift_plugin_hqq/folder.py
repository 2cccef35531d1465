"""A quantized model on disk: safetensors, and a config.json whose `quantization_config` says how to read them.

    {"quant_method": "hqq", "bits": 4, "group_size": 64, "axis": 1, "skip": ["lm_head"], "tied": {...}}

Of each quantized layer there are `W_q`, `scale`, `zero` and `bias`. A shared weight is written once; `tied` names the rest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hqq.core.quantize import HQQLinear
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from swift_core.errors import RequestError
from torch import nn

from swift_plugin_hqq.layers import Settings, layer_tensors, model_settings

METHOD = "hqq"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Header:
    """What config.json says of a quantized folder. `tied`: further name of a weight -> the name it is saved under."""

    settings: Settings
    tied: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"quant_method": METHOD, **self.settings.to_json(), "tied": self.tied}


def quant_method(source: str) -> str | None:
    """The quantization that a local folder's config.json names, if any."""
    return (_read_config(Path(source)).get("quantization_config") or {}).get("quant_method")


def read_header(folder: Path) -> Header:
    """Raises RequestError for a folder that was not written by `write_model`."""
    data = _read_config(folder).get("quantization_config") or {}
    if data.get("quant_method") != METHOD:
        raise RequestError(f"model {folder} is not a folder quantized by hqq")
    lacks = [key for key in ("bits", "group_size", "axis", "skip", "tied") if key not in data]
    if lacks:
        raise RequestError(
            f"model {folder}: its quantization_config has no {lacks[0]!r}: another program wrote it. "
            "Quantize the original model with `swift-core quantize`"
        )
    return Header(Settings(data["bits"], data["group_size"], data["axis"], tuple(data["skip"])), data["tied"])


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, OSError) as err:
        raise RequestError(f"{file} cannot be read: {err}") from None
    return data if isinstance(data, dict) else {}


def model_tensors(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Every tensor to save by name, each once, and the further names of shared ones."""
    tensors: dict[str, torch.Tensor] = {}
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, tensor in saved_tensors(model):
        if id(tensor) in first:
            tied[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[name] = tensor
    return tensors, tied


def saved_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers by name, shared ones more than once; HQQ layers as their own tensors."""
    for path, module in model.named_modules(remove_duplicate=False):
        dot = f"{path}." if path else ""
        if isinstance(module, HQQLinear):
            yield from ((dot + name, tensor) for name, tensor in layer_tensors(module).items())
            continue
        yield from ((dot + name, parameter) for name, parameter in module._parameters.items() if parameter is not None)
        transient = module._non_persistent_buffers_set
        yield from ((dot + n, b) for n, b in module._buffers.items() if b is not None and n not in transient)


def write_model(model: Any, processor: Any, folder: Path, shard_size: str) -> None:
    """Write weights, tokenizer or processor, generation config, and config.json last: a broken-off folder is no model."""
    settings = model_settings(model)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.safetensors*"):
        if stale.name in (SINGLE, INDEX) or re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", stale.name):
            stale.unlink()
    (folder / "config.json").unlink(missing_ok=True)
    tensors, tied = model_tensors(model)
    plan = split_torch_state_dict_into_shards(tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_size)
    for name, keys in plan.filename_to_tensors.items():
        # A clone where two tensors are views of one storage, which safetensors refuses.
        shard = {key: tensors[key].detach().contiguous() for key in keys}
        storages = [tensor.untyped_storage().data_ptr() for tensor in shard.values()]
        shared = {pointer for pointer in storages if storages.count(pointer) > 1}
        save_file(
            {key: t.clone() if t.untyped_storage().data_ptr() in shared else t for key, t in shard.items()},
            folder / name,
            metadata={"format": "pt"},
        )
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    processor.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    _write_config(model, Header(settings, tied), folder)


def _write_config(model: Any, header: Header, folder: Path) -> None:
    config = json.loads(model.config.to_json_string(use_diff=True))
    config |= {
        "architectures": model.config.architectures or [type(model).__name__],
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization_config": header.to_json(),
    }
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def read_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a folder's weight files, one at a time. Raises RequestError for missing or truncated files."""
    index = folder / INDEX
    if index.is_file():
        try:
            placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, OSError) as err:
            raise RequestError(f"{index} cannot be read: {type(err).__name__}: {err}") from None
        files = sorted(set(placed.values()))
    else:
        files = [SINGLE]
    for name in files:
        file = folder / name
        if not file.is_file():
            raise RequestError(f"model {folder} lacks its weight file {name}. Copy it again from its source")
        try:
            with safe_open(file, framework="pt") as stream:
                for key in stream.keys():  # noqa: SIM118  (it is no mapping)
                    yield key, stream.get_tensor(key)
        except SafetensorError as err:
            raise RequestError(f"{file} is truncated or damaged: {err}. Copy it again from its source") from None
