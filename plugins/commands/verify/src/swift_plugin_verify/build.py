"""Builds the tiny random model of an architecture, with its tokenizer, and saves both as a folder that loads like any other.

Weights come from the architecture's own initialisation, at a size at which logits differ; what it leaves at zero, such as a
gate that opens during training, gets small values, so that every part takes part.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from swift_plugin_transformers.hooks import swift_make_template
from swift_plugin_transformers.loading import cast_media
from swift_plugin_transformers.processors import mark_encoder_decoder
from transformers import CONFIG_MAPPING

from swift_plugin_verify.catalog import Architecture
from swift_plugin_verify.processors import (
    COUNTS,
    NoProcessor,
    Words,
    make_processor,
    make_words,
    medium,
    processor_class,
    template_options,
)
from swift_plugin_verify.rows import media_rows
from swift_plugin_verify.shrink import Shape, shrink
from swift_plugin_verify.tokens import VOCABULARY, make_tokenizer, token_ids

LARGEST = 30_000_000  # parameters: what the rule leaves larger is an error of the rule


class CannotBuild(Exception):
    """The tiny model cannot be made; the message is the reason."""


def build(architecture: Architecture, folder: Path) -> Any:
    """Write the tiny model into `folder`, and return it. Raises CannotBuild."""
    if architecture.kind != "text":
        return build_media(architecture, folder)
    tokenizer = make_tokenizer()
    config = tiny_config(architecture, Shape(VOCABULARY, token_ids(tokenizer)))
    model = tiny_model(architecture.name, config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def build_media(architecture: Architecture, folder: Path) -> Any:
    """A model that takes images or sound, with its processor. The number of tokens that its processor makes of an image is
    found by trying, where it is an argument of the processor. Raises CannotBuild."""
    try:
        kind = processor_class(architecture.model_type)
        words = make_words(architecture.model_type, kind)
        tokenizer = words.tokenizer
        size = max(VOCABULARY, -(-len(tokenizer) // 64) * 64)
        ids = dict(tokenizer.get_added_vocab())
        ids |= {name: tokenizer.convert_tokens_to_ids(text) for name, text in words.texts.items()}
        config = tiny_config(architecture, Shape(size, token_ids(tokenizer) | ids), words)
        model = tiny_model(architecture.name, config)
        takes_count = any(name in COUNTS for name in inspect.signature(kind.__init__).parameters)
        faults: list[str] = []
        for count in (16, 4, 1, 17, 64, 8, 2, 32) if takes_count else (None,):
            processor = make_processor(architecture.model_type, kind, words, config, count)
            fault = refuses(model, processor, architecture)
            if fault is None:
                break
            faults.append(fault)
        else:
            raise CannotBuild(f"its processor and its model do not fit: {faults[0]}")
    except NoProcessor as err:
        raise CannotBuild(str(err)) from err
    except CannotBuild:
        raise
    except Exception as err:
        raise CannotBuild(f"no processor: {one_line(err)}") from err
    processor.tokenizer.backend_tokenizer.no_padding()  # trying it left padding switched on, which would be saved
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


def refuses(model: Any, processor: Any, architecture: Architecture) -> str | None:
    """Why a model does not take what its processor makes of a row; None where it does."""
    cast_media(model)  # as a loaded one does
    mark_encoder_decoder(processor, model.config, model.generation_config, type(model).__name__)
    try:
        template: Any = swift_make_template("checkpoint", processor, template_options(architecture.model_type))
        batch = template.collate(template.encode(media_rows(medium(processor, architecture.kind))[0]))
        with torch.no_grad():
            model(**batch.inputs, use_cache=False)
    except Exception as err:
        return one_line(err)
    return None


def tiny_config(architecture: Architecture, shape: Shape, words: Words | None = None) -> Any:
    """The configuration by rule; `words`: the special tokens, for one that has none of its own. Raises CannotBuild."""
    try:
        cls = config_class(architecture)
        names = {field.name for field in fields(cls)}
        kinds = [name for name in ("image", "video") if words and name in words.texts]  # ids that are None by default
        given: dict[str, Any] = {
            f"{name}_token_{end}": shape.tokens[name] for name in kinds for end in ("id", "index")
            if f"{name}_token_{end}" in names and getattr(cls(), f"{name}_token_{end}") is None
        }  # fmt: skip
        default = cls()
        if getattr(default, "is_encoder_decoder", False) and getattr(default, "decoder_start_token_id", None) is None:
            given["decoder_start_token_id"] = shape.tokens["decoder_start"]
        if words and "vocabulary_map" in names:
            given["vocabulary_map"] = words.tokenizer.get_added_vocab()
        return shrink(cls, shape, given)
    except Exception as err:
        raise CannotBuild(f"no tiny configuration: {one_line(err)}") from err


def config_class(architecture: Architecture) -> type:
    """The model type's own class, where the model takes it: a text model of a multimodal type takes that type's text part."""
    own: type = CONFIG_MAPPING[architecture.model_type]
    wanted = getattr(transformers, architecture.name).config_class
    parts = [spec for spec in getattr(own, "sub_configs", {}).values() if spec is wanted]
    return parts[0] if parts else own


def tiny_model(name: str, config: Any) -> Any:
    """A model of a class with random weights, always the same. Raises CannotBuild."""
    cls = getattr(transformers, name)
    if cls.forward is torch.nn.Module.forward:
        raise CannotBuild("the class has no forward pass to train through: only its parts have one")
    try:
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in cls(config).parameters())
    except Exception:
        count = 0  # a class that computes while it is built: it is built for real below
    if count > LARGEST:
        raise CannotBuild(f"its tiny configuration still has {count:,} parameters")
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = cls(config).eval()
            enliven(model)
    except Exception as err:
        raise CannotBuild(f"cannot be built: {one_line(err)}") from err
    return model


def enliven(model: torch.nn.Module) -> None:
    """Give values to parameters that the class leaves at zero or all but zero, or does not initialise at all. The weights of a
    tower of timm, which is told no size for them, get one at which its pictures do not fade from layer to layer."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "timm_model." in name and parameter.ndim > 1:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5)
            largest = float(parameter.abs().max()) if parameter.numel() and parameter.is_floating_point() else 1.0
            if largest < 1e-3 or not math.isfinite(largest) or largest > 1e4:
                parameter.normal_(0.0, 0.05)


def one_line(err: BaseException) -> str:
    """An error's type and the first line of its text that says something."""
    lines = [" ".join(line.split()) for line in str(err).splitlines() if line.strip()]
    text = next((line for line in lines if not line.endswith(":")), lines[0] if lines else "")
    return f"{type(err).__name__}: {text}"[:240]
