"""Processors of multimodal architectures, made locally: the architecture's own processor class around a local tokenizer and
an image processor or feature extractor of small sizes.

Which special tokens a processor looks for is read from its source and from the fields of the configuration.
"""

from __future__ import annotations

import inspect
import re
import tomllib
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from swift_plugin_transformers.config import ChatTemplateConfig
from swift_plugin_transformers.multimodal import takes
from swift_plugin_transformers.processors import without_videos
from transformers import CONFIG_MAPPING
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES
from transformers.utils import is_torchvision_available

from swift_plugin_verify.shrink import NOT_TOKENS, TOKEN
from swift_plugin_verify.tokens import ALIASES, BASE, chat_template, make_tokenizer

IMAGE, PATCH = 32, 8
COUNTS = ("image_seq_length", "image_seq_len", "num_image_tokens", "num_image_token", "num_query_tokens", "image_length")
LITERAL = re.compile(r"""["'](<[^"'<>\s{}]{1,40}>|\[[A-Z_]{2,30}\])["']""")
ATTRIBUTE = re.compile(r"tokenizer\.(\w+?)_token(?:_id)?\b")
ASSIGNED = re.compile(r"""self\.(\w+)_token\s*=\s*[^\n]*?["'](<[^"'<>\s{}]{1,40}>|\[[A-Z_]{2,30}\])["']""")


class NoProcessor(Exception):
    """The processor cannot be made; the message is the reason."""


@dataclass(frozen=True)
class Words:
    """A tokenizer with the special tokens that a processor needs, and their texts by name."""

    tokenizer: Any
    texts: dict[str, str]


@cache
def exceptions() -> dict[str, dict[str, Any]]:
    """What the rule cannot tell of a processor, by model type: `placeholder` texts, `arguments`, `image` settings."""
    return tomllib.loads((Path(__file__).parent / "processors.toml").read_text(encoding="utf-8"))


def template_options(model_type: str) -> ChatTemplateConfig:
    """Options of the template, as a user may give them."""
    call = exceptions().get(model_type, {}).get("call")
    return ChatTemplateConfig(media={"processor": call}) if call else ChatTemplateConfig()


def medium(processor: Any, kind: str) -> str:
    """What an architecture of a kind is shown: a video in place of an image where its processor takes no images."""
    kinds = takes(processor)
    return "video" if kind == "image" and "image" not in kinds and "video" in kinds else kind


def processor_class(model_type: str) -> Any:
    """The library's processor class of a model type. Raises NoProcessor."""
    own = exceptions().get(model_type, {})
    name = own.get("processor") or PROCESSOR_MAPPING_NAMES.get(model_type)
    if not name:
        raise NoProcessor("the library has no processor for it")
    kind = getattr(transformers, name)
    if lacks := getattr(kind, "_backends", None):  # what the library gives in place of a class that it cannot import
        raise NoProcessor(f"its processor needs {' and '.join(lacks)}")
    return kind


def make_words(model_type: str, kind: Any) -> Words:
    """The tokenizer of a processor class: special tokens named in its source, and one for each token that the configuration
    has a field for."""
    source = inspect.getsource(inspect.getmodule(kind)) if kind else ""
    texts: dict[str, str] = dict(ASSIGNED.findall(source))
    for name, parameter in inspect.signature(kind.__init__).parameters.items() if kind else ():
        if name.endswith("_token") and isinstance(parameter.default, str):
            texts[name.removesuffix("_token")] = parameter.default
    for name in [*ATTRIBUTE.findall(source), *token_fields(CONFIG_MAPPING[model_type]())]:
        if not name.startswith("add_"):  # a switch of the tokenizer
            texts.setdefault(name, f"<|{name}|>")
    own = exceptions().get(model_type, {})
    texts |= own.get("tokens", {})
    plain = {name: text for name, text in texts.items() if name not in BASE and name not in ALIASES}
    unnamed = own.get("unnamed", [])
    special = [*LITERAL.findall(source), *own.get("special", []), *(plain[name] for name in unnamed)]
    named = {f"{name}_token": text for name, text in plain.items() if name not in unnamed}
    tokenizer = make_tokenizer(special, **named)
    return Words(tokenizer, plain)


def token_fields(config: Any) -> list[str]:
    """Names of the tokens that a configuration and its parts have ids of."""
    found = []
    for field in fields(type(config)):
        value = config.__dict__.get(field.name)
        if hasattr(value, "sub_configs"):
            found += token_fields(value)
        token = TOKEN.fullmatch(field.name)
        if token and not NOT_TOKENS.fullmatch(field.name) and isinstance(value, int):
            found.append(token[1])
    return list(dict.fromkeys(found))


def make_processor(model_type: str, kind: Any, words: Words, config: Any, count: int | None) -> Any:
    """The processor with small sizes. `count`: tokens of an image, where the class takes them as an argument."""
    own = exceptions().get(model_type, {})
    parts = []
    for part in kind.get_attributes():
        if part == "tokenizer" or part.endswith("_tokenizer"):
            parts.append(words.tokenizer)
        elif part == "video_processor":
            parts.append(video_processor(model_type, config, own.get("video", {}), kind.__name__))
        elif part == "image_processor":
            parts.append(image_processor(model_type, config, own.get("image", {})))
        else:
            parts.append(feature_extractor(model_type, config, own.get("audio", {})))
    arguments = _arguments(kind, config, count) | own.get("arguments", {})
    lenient = type(kind.__name__, (kind,), {"check_argument_for_proper_class": _unchecked, "__module__": kind.__module__})
    made = lenient(*parts, **arguments)
    made.chat_template = words.tokenizer.chat_template = template_of(model_type, made, words)
    return made


def _unchecked(self: Any, name: str, argument: Any) -> Any:
    return type(argument)


def template_of(model_type: str, processor: Any, words: Words) -> str:
    """ChatML, with what stands for an image, a video or a sound before the processor expands it."""
    placed = exceptions().get(model_type, {}).get("placeholder", {})

    def text(kind: str) -> str:
        if kind in placed:
            return str(placed[kind])
        inner = getattr(processor, f"{kind}_token", None) or words.texts.get(kind) or ""
        begin = words.texts.get("vision_start", "") if kind in ("image", "video") else ""
        end = words.texts.get("vision_end", "") if kind in ("image", "video") else ""
        return f"{begin}{inner}{end}" if begin and end else str(inner)

    return chat_template(**{kind: text(kind).replace("'", "\\'") for kind in ("image", "video", "audio")})


def image_processor(model_type: str, config: Any, given: dict[str, Any]) -> Any:
    """The architecture's image processor, on pillow where there is such a one. Raises NoProcessor."""
    names = IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type) or {}
    name = given.get("class") or names.get("pil") or (names.get("torchvision") if is_torchvision_available() else None)
    if not name:
        raise NoProcessor("its image processor needs torchvision" if names else "the library names no image processor for it")
    return small(getattr(transformers, name), config, given)


def video_processor(model_type: str, config: Any, given: dict[str, Any], owner: str) -> Any:
    """The architecture's video processor; without torchvision, what refuses videos. Raises NoProcessor."""
    if not is_torchvision_available():
        return without_videos(given, owner)
    name = given.get("class") or (VIDEO_PROCESSOR_MAPPING_NAMES.get(model_type) or {}).get("torchvision")
    if not name:
        raise NoProcessor("the library names no video processor for it")
    return small(getattr(transformers, name), config, given)


def small(cls: Any, config: Any, given: dict[str, Any]) -> Any:
    """An image or video processor that makes small pictures."""
    default = cls()
    options: dict[str, Any] = {}
    for field in ("size", "crop_size", "max_image_size", "high_res_size"):
        size = getattr(default, field, None)
        if size is not None and not isinstance(size, int):
            options[field] = _size(dict(size))
    for field, value in (("patch_size", _vision(config, "patch_size")), ("min_pixels", 256), ("max_pixels", 1024)):
        if getattr(default, field, None) is not None and value is not None:
            options[field] = value
    for field in ("merge_size", "temporal_patch_size"):
        wanted = _vision(config, {"merge_size": "spatial_merge_size"}.get(field, field))
        if hasattr(default, field) and wanted is not None:
            options[field] = wanted
    if getattr(default, "image_grid_pinpoints", None):
        options["image_grid_pinpoints"] = [[IMAGE, 2 * IMAGE], [2 * IMAGE, IMAGE], [2 * IMAGE, 2 * IMAGE]]
    return cls(**{**options, **{key: value for key, value in given.items() if key != "class"}})


def _size(size: dict[str, Any]) -> dict[str, int]:
    """A size of the same form: sides of pixels, or numbers of pixels where it counts those."""
    area = max((value for value in size.values() if isinstance(value, int)), default=0) > 8192
    small = {"shortest_edge": 256, "longest_edge": 1024} if area else {}
    return {key: small.get(key, IMAGE) for key, value in size.items() if value is not None}


def feature_extractor(model_type: str, config: Any, given: dict[str, Any]) -> Any:
    """The architecture's feature extractor."""
    name = given.get("class") or FEATURE_EXTRACTOR_MAPPING_NAMES.get(model_type)
    if not name:
        raise NoProcessor("the library names no feature extractor for it")
    cls = getattr(transformers, name)
    bins = _part(config, ("num_mel_bins", "feature_size", "n_mels", "input_dim", "mel_bins"))
    options = {"feature_size": bins} if bins and "feature_size" in inspect.signature(cls.__init__).parameters else {}
    return cls(**{**options, **{key: value for key, value in given.items() if key != "class"}})


def _arguments(kind: Any, config: Any, count: int | None) -> dict[str, Any]:
    """The processor's own arguments, from the configuration."""
    found: dict[str, Any] = {}
    for name in inspect.signature(kind.__init__).parameters:
        if name in COUNTS and count is not None:
            found[name] = count
        elif name == "patch_size":
            found[name] = _vision(config, "patch_size")
        elif name == "vision_feature_select_strategy":
            found[name] = getattr(config, name, "default")
        elif name == "num_additional_image_tokens":
            found[name] = 1 if getattr(config, "vision_feature_select_strategy", "default") == "default" else 0
        elif hasattr(config, name) and isinstance(getattr(config, name), int):
            found[name] = getattr(config, name)
    return found


def _vision(config: Any, name: str) -> Any:
    value = _part(config, (name,))
    return value[0] if isinstance(value, list | tuple) and value else value


def _part(config: Any, names: tuple[str, ...]) -> Any:
    """The first of some fields that a configuration or one of its media parts has."""
    parts = [config]
    while parts:
        part = parts.pop(0)
        for name in names:
            if part is not config and getattr(part, name, None) is not None:
                return getattr(part, name)
        parts += [getattr(part, key) for key in part.sub_configs if "text" not in key and getattr(part, key, None) is not None]
    return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), None)
