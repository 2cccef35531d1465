"""Loads models through the transformers library, and says plainly what is wrong with a folder.

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
from transformers import AutoConfig
from transformers.utils import logging

from swift_plugin_transformers import attention, pooling
from swift_plugin_transformers.architectures import HEADS, choose, needs_own_code
from swift_plugin_transformers.config import TransformersConfig
from swift_plugin_transformers.parts import find_parts
from swift_plugin_transformers.processors import first_line, load_processor, own_code, where_from

__all__ = ["PROBLEMS", "load_model", "load_processor"]

PROBLEMS = {
    "single_label": "single_label_classification", "multi_label": "multi_label_classification", "regression": "regression",
}  # fmt: skip
"""The options' names of what a classification head predicts -> the library's."""


def load_model(source: str, processor: Any, load_kwargs: dict[str, Any], config: TransformersConfig) -> ModelBundle:
    """Load weights as `load_kwargs["dtype"]` on `load_kwargs["device"]`, in eval mode.

    `skeleton=True` builds the model on the meta device, without weights. Only the head of `config.task` may be new: its
    weights are then drawn from the run's seed, and that is said. Raises RequestError for a folder that is incomplete, that
    needs code of its own, or that has no model of the task.
    """
    options = dict(load_kwargs)
    device, dtype = options.pop("device", "cpu"), options.pop("dtype", torch.float32)
    skeleton = options.pop("skeleton", False)
    logging.disable_progress_bar()
    where, trust = where_from(source, config), config.trust_remote_code
    try:
        model_config = AutoConfig.from_pretrained(source, trust_remote_code=trust, **where)
    except Exception as err:
        if needs_own_code(Path(source)) and not trust:
            raise own_code(source) from err
        raise RequestError(f"model {source}: its config.json cannot be used: {first_line(err)}") from err
    architecture = (model_config.architectures or [None])[0]
    choice = choose(model_config, config.task, source)
    if choice.task in HEADS:
        set_labels(model_config, choice.task, config, processor)
    chosen = {} if config.attention == "auto" else {"attn_implementation": config.attention}
    if skeleton:
        if hasattr(model_config, "quantization_config"):
            del model_config.quantization_config
        with torch.device("meta"):
            model = choice.loader.from_config(model_config, dtype=dtype, trust_remote_code=trust, **chosen)
        return ModelBundle(model.eval(), processor, source, architecture, task=choice.task, parts=find_parts(model))
    if Path(source).is_dir():
        check_weights(Path(source), config.allow_pickle)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of the weights, of many lines: what matters of it is said below
    try:
        # A new head is the same on every rank and in every run with the seed, whatever ran before.
        with torch.random.fork_rng():
            torch.manual_seed(torch.initial_seed())
            model, info = choice.loader.from_pretrained(
                source, config=model_config, dtype=dtype, use_safetensors=None if config.allow_pickle else True,
                weights_only=True, output_loading_info=True, trust_remote_code=trust,
                ignore_mismatched_sizes=True, **chosen, **where, **options,
            )  # fmt: skip
    except Exception as err:
        raise RequestError(f"model {source} cannot be loaded: {first_line(err)}") from err
    finally:
        logging.set_verbosity(verbosity)
    check_loaded(source, model, info, choice.task)
    pooling.install(model)
    if config.attention == "auto":
        attention.install(model)
    if hasattr(processor, "tokenizer"):
        cast_media(model)
    model = model.to(device).eval()
    return ModelBundle(model, processor, source, architecture, task=choice.task, parts=find_parts(model))


def cast_media(model: Any) -> None:
    """Let a model take pictures that its processor makes in a half precision, as Llama 4's does, in the one it computes in."""

    def cast(model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        half = (torch.bfloat16, torch.float16)
        found = {key: value for key, value in kwargs.items() if isinstance(value, torch.Tensor) and value.dtype in half}
        return args, {**kwargs, **{key: value.to(model.dtype) for key, value in found.items()}}

    model.register_forward_pre_hook(cast, with_kwargs=True)


def check_loaded(source: str, model: Any, info: dict[str, Any], task: str) -> None:
    """Say which weights of a head are new. Raises RequestError where others are missing, or any has another shape."""
    for name, found, wanted in sorted(info["mismatched_keys"])[:1]:
        raise RequestError(f"model {source}: {name} has shape {tuple(found)}, and config.json asks for {tuple(wanted)}")
    missing, unused = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if task in HEADS:
        base = f"{model.base_model_prefix}."
        bare = not hasattr(model, model.base_model_prefix)
        new = [name for name in missing if ".pooler." in f".{name}" or not (bare or name.startswith(base))]
        missing = [name for name in missing if name not in new]
        unused = [name for name in unused if name.startswith(base)]  # the head that it had is left behind
        if new and not bare:
            names = ", ".join(new)
            warnings.warn(
                f"model {source}: its head for {task} is new, drawn from the seed (an adapter may bring its own): {names}"
            )
    if missing:
        raise RequestError(f"model {source} lacks {len(missing)} weights, {missing[0]} first: is the folder complete?")
    if unused:
        warnings.warn(f"model {source}: {len(unused)} of its weights have no place in the model, {unused[0]} first")


def set_labels(model_config: Any, task: str, config: TransformersConfig, processor: Any) -> None:
    """Give a configuration what its head needs: the number and names of its classes, the problem, and a padding token, by
    which the library finds the last token of each row."""
    count = 1 if task in ("reranker", "reward") else config.num_labels or len(config.labels) or None
    if config.labels and config.num_labels not in (None, len(config.labels)):
        raise RequestError(f"model.num_labels is {config.num_labels}, and model.labels has {len(config.labels)} names")
    if count is None and config.problem == "regression" and model_config.problem_type != "regression":
        count = 1  # a folder that is no regression model says nothing of its numbers
    if count:
        model_config.num_labels = count
    if config.labels and task in ("sequence_classification", "token_classification"):
        model_config.id2label = dict(enumerate(config.labels))
        model_config.label2id = {name: number for number, name in enumerate(config.labels)}
    if task in ("reranker", "reward"):
        model_config.problem_type = "regression" if task == "reranker" else None
    elif task == "sequence_classification" and config.problem:
        model_config.problem_type = PROBLEMS[config.problem]
    text = model_config.get_text_config()
    if getattr(text, "pad_token_id", None) is None:
        tokenizer = getattr(processor, "tokenizer", processor)
        found = [getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "eos")] + [
            getattr(text, "eos_token_id", None)
        ]
        pad = next((token for token in found if token is not None), None)
        text.pad_token_id = pad[0] if isinstance(pad, list) else pad


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
