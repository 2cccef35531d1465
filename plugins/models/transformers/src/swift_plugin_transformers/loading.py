"""Loads tokenizers and causal language models through the transformers library, and says plainly what is wrong with a folder.

safetensors only, unless the run allows pickles; a weight that the folder lacks is an error, never a random tensor.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from swift_core.errors import RequestError
from swift_core.types import ModelBundle
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from swift_plugin_transformers.attention import install
from swift_plugin_transformers.config import TransformersConfig


def load_processor(source: str, config: TransformersConfig) -> Any:
    """The tokenizer of a folder or hub id. Raises RequestError when there is none."""
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=config.trust_remote_code, **_where(source, config))
    except Exception as err:
        folder = Path(source)
        absent = folder.is_dir() and not (folder / "tokenizer.json").is_file()
        why = "the folder holds no tokenizer.json" if absent else _first_line(err)
        raise RequestError(f"model {source}: its tokenizer cannot be loaded: {why}") from err


def load_model(source: str, processor: Any, load_kwargs: dict[str, Any], config: TransformersConfig) -> ModelBundle:
    """Load weights as `load_kwargs["dtype"]` on `load_kwargs["device"]`, in eval mode.

    `skeleton=True` builds the model on the meta device, without weights. Raises RequestError for a folder that is
    incomplete or that needs code of its own.
    """
    options = dict(load_kwargs)
    device, dtype = options.pop("device", "cpu"), options.pop("dtype", torch.float32)
    skeleton = options.pop("skeleton", False)
    logging.disable_progress_bar()
    where = _where(source, config)
    try:
        model_config = AutoConfig.from_pretrained(source, trust_remote_code=config.trust_remote_code, **where)
    except Exception as err:
        raise RequestError(f"model {source}: its config.json cannot be used: {_first_line(err)}") from err
    architecture = (model_config.architectures or [None])[0]
    attention = {} if config.attention == "auto" else {"attn_implementation": config.attention}
    if skeleton:
        if hasattr(model_config, "quantization_config"):
            del model_config.quantization_config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                model_config, dtype=dtype, trust_remote_code=config.trust_remote_code, **attention
            )
        return ModelBundle(model.eval(), processor, source, architecture)
    if Path(source).is_dir():
        check_weights(Path(source), config.allow_pickle)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of the weights, of many lines: what matters of it is said below
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source, config=model_config, dtype=dtype, use_safetensors=None if config.allow_pickle else True,
            weights_only=True, output_loading_info=True, trust_remote_code=config.trust_remote_code,
            ignore_mismatched_sizes=True, **attention, **where, **options,
        )  # fmt: skip
    except Exception as err:
        raise RequestError(f"model {source} cannot be loaded: {_first_line(err)}") from err
    finally:
        logging.set_verbosity(verbosity)
    for name, found, wanted in sorted(info["mismatched_keys"])[:1]:
        raise RequestError(f"model {source}: {name} has shape {tuple(found)}, and config.json asks for {tuple(wanted)}")
    missing = sorted(info["missing_keys"])
    if missing:
        raise RequestError(f"model {source} lacks {len(missing)} weights, {missing[0]} first: is the folder complete?")
    unused = sorted(info["unexpected_keys"])
    if unused:
        warnings.warn(f"model {source}: {len(unused)} of its weights have no place in the model, {unused[0]} first")
    if config.attention == "auto":
        install(model)
    return ModelBundle(model.to(device).eval(), processor, source, architecture)


def check_weights(folder: Path, allow_pickle: bool) -> None:
    """Raise RequestError where weight files are missing, truncated, or pickles that the run does not allow."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, OSError) as err:
            raise RequestError(f"{index} cannot be read: {err}") from None
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise RequestError(f"model {folder} lacks {len(absent)} of {len(names)} weight files, {absent[0]} first")
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        if not list(folder.glob("*.bin")):
            raise RequestError(f"model {folder} holds no weights: no .safetensors file")
        if not allow_pickle:
            raise RequestError(f"model {folder} holds .bin weights only; allow_pickle=true reads them with weights_only=True")
    for file in files:
        check_safetensors(file)


def check_safetensors(file: Path) -> None:
    """Compare a safetensors file's size with its own header. Raises RequestError."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = {}
        if 0 < length <= size - 8:
            try:
                header = json.loads(stream.read(length))
            except ValueError:
                raise RequestError(f"{file} is damaged: its header is not JSON. Copy it again from its source") from None
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    expected = 8 + length + max(ends, default=0)
    if size < expected:
        raise RequestError(
            f"{file} is truncated: it has {size} bytes, its header needs {expected}. Copy it again from its source"
        )


def _where(source: str, config: TransformersConfig) -> dict[str, Any]:
    return {"local_files_only": True} if Path(source).is_dir() else {"revision": config.revision or "main"}


def _first_line(err: Exception) -> str:
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    return f"{type(err).__name__}: {lines[0] if lines else ''}"
