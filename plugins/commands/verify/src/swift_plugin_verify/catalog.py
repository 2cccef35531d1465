"""The architectures of the installed transformers version, by kind: those that its own tables name.

A class that stands in several tables is listed once, under the richest kind that it can do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

KINDS = ("text", "image", "audio")
HEAR = (
    "canary", "cohere_asr", "moonshine", "moonshine_streaming", "seamless_m4t", "seamless_m4t_v2", "speech_to_text", "speecht5",
    "whisper",
)  # fmt: skip
"""Model types whose encoder-decoder writes down what it hears; the library's table has some that make sounds beside them."""


@dataclass(frozen=True, order=True)
class Architecture:
    """One class to verify. `model_type` is its configuration's."""

    kind: str
    model_type: str
    name: str

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.model_type}/{self.name}"


def architectures() -> list[Architecture]:
    """All that the library's tables for text generation, image-text and audio-language models name."""
    from transformers.models.auto import modeling_auto as auto

    listed = auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    blind = {model_type: name for model_type, name in listed.items() if _reads_text_only(model_type, name)}
    image = {model_type: name for model_type, name in listed.items() if model_type not in blind}
    audio = {
        model_type: name for model_type, name in auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.items() if model_type not in listed
    }
    for model_type, name in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.items():
        heard = model_type in auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES or "flamingo" in model_type
        if heard and not name.endswith("TextToText"):
            audio.setdefault(model_type, name)
    for model_type in HEAR:
        audio.setdefault(model_type, auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES[model_type])
    text = {
        model_type: name for model_type, name in {**blind, **auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}.items()
        if name not in {*image.values(), *audio.values()}
    }  # fmt: skip
    kinds = zip(KINDS, (text, image, audio), strict=True)
    found = [Architecture(kind, model_type, name) for kind, table in kinds for model_type, name in sorted(table.items())]
    others = {one.name for one in found}  # a type may have a decoder alone and an encoder-decoder
    encoders = auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    found += [Architecture("text", model_type, name) for model_type, name in encoders.items() if name not in others]
    return [one for one in found if not _stands_for_its_text_part(one, found)]


def _reads_text_only(model_type: str, name: str) -> bool:
    """Whether a class of the table for images is a text model: one for a causal language, whose configuration has no parts."""
    from transformers import CONFIG_MAPPING

    return name.endswith("ForCausalLM") and not CONFIG_MAPPING[model_type].sub_configs


def _stands_for_its_text_part(one: Architecture, found: Sequence[Architecture]) -> bool:
    """Whether a row names a multimodal configuration, and another row its text part with the same class."""
    return any(other.name == one.name and other.model_type == f"{one.model_type}_text" for other in found)


def choose(known: Sequence[Architecture], names: Sequence[str], kinds: Sequence[str]) -> tuple[list[Architecture], list[str]]:
    """Those asked for by class name or model type, of the kinds asked for; and the names that match none."""
    of_kind = [one for one in known if not kinds or one.kind in kinds]
    if not names:
        return of_kind, []
    wanted = set(names)
    chosen = [one for one in of_kind if {one.name, one.model_type} & wanted]
    return chosen, sorted(wanted - {text for one in chosen for text in (one.name, one.model_type)})
