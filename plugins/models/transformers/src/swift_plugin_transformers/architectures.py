"""Which class of the transformers library loads a folder: chosen by config.json's architecture and by the task.

`auto` takes the architecture that config.json names. A task with a head of its own takes the architecture's class for that
task, or where the library has none, a class made here of the library's own parts. Nothing is loaded here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from swift_core.errors import RequestError
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.models.auto import modeling_auto as auto

HEADS = {
    "sequence_classification": auto.AutoModelForSequenceClassification,
    "reranker": auto.AutoModelForSequenceClassification,
    "reward": auto.AutoModelForSequenceClassification,
    "token_classification": auto.AutoModelForTokenClassification,
    "embedding": auto.AutoModel,
}
"""Tasks other than text generation -> what loads them."""

KINDS = (
    (auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, auto.AutoModelForSequenceClassification, "sequence_classification"),
    (auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, auto.AutoModelForTokenClassification, "token_classification"),
    (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.AutoModelForCausalLM, "causal_lm"),
    (auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, auto.AutoModelForMultimodalLM, "causal_lm"),
    (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, auto.AutoModelForSeq2SeqLM, "seq2seq_lm"),
    (auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES, auto.AutoModelForSpeechSeq2Seq, "seq2seq_lm"),
    (auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, auto.AutoModelForMaskedLM, "masked_lm"),
    (auto.MODEL_MAPPING_NAMES, auto.AutoModel, "embedding"),
)
ENDINGS = {"ForSequenceClassification": KINDS[0], "ForTokenClassification": KINDS[1], "ForCausalLM": KINDS[2]}
"""Of architectures that the library does not list: names of remote code, and of classes made here."""


@dataclass(frozen=True)
class Choice:
    """`loader` has from_pretrained and from_config; `task` is what its head does."""

    loader: Any
    task: str
    made: bool = False  # a class of this module: the library's Auto classes do not know it


def choose(config: Any, task: str, source: str) -> Choice:
    """The loader of a model by its configuration. Raises RequestError where there is none, or where code is not trusted."""
    architecture = (config.architectures or [None])[0]
    if task not in ("auto", "causal_lm"):
        return _headed(config, task, source)
    if task == "causal_lm" and architecture is not None and _known(architecture, config)[1] not in ("causal_lm", "seq2seq_lm"):
        loader = auto.AutoModelForMultimodalLM if is_multimodal(config) else auto.AutoModelForCausalLM
        return Choice(loader, "causal_lm")
    loader, found = _known(architecture, config)
    if loader in (auto.AutoModelForSequenceClassification, auto.AutoModelForTokenClassification):
        return _headed(config, found, source)
    own = getattr(transformers, architecture or "", None)
    if not _maps(loader, config) and isinstance(own, type) and issubclass(own, PreTrainedModel):
        return Choice(Named(own), found)
    return Choice(loader, found)


def is_multimodal(config: Any) -> bool:
    """Whether a model of this configuration takes images, videos or sound beside text."""
    if config.model_type in auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES:
        text_only = next(iter(config.architectures or ()), "") in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        return not text_only or any(hasattr(config, f"{part}_config") for part in ("vision", "audio"))
    if config.model_type in auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES:  # Whisper and its kind hear, and have no parts
        return next(iter(config.architectures or ()), "") not in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return any(getattr(config, f"{part}_config", None) is not None for part in ("vision", "audio", "thinker"))


def needs_own_code(folder: Path) -> bool:
    """Whether a folder's config.json points to Python files beside it and names a model type that the library lacks."""
    try:
        data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(data.get("auto_map")) and data.get("model_type") not in transformers.CONFIG_MAPPING


def _known(architecture: str | None, config: Any) -> tuple[Any, str]:
    """The Auto class that an architecture's name stands for, and its task; for a folder without a name, by its type."""
    if architecture is None:
        kinds = [kind for kind in KINDS[2:] if config.model_type in kind[0]]
        multimodal = [kind for kind in kinds if is_multimodal(config) and kind[1] is auto.AutoModelForMultimodalLM]
        kind = next(iter(multimodal or kinds), KINDS[2])
        return kind[1], kind[2]
    for names, loader, task in KINDS:
        if _listed(names, architecture):
            return loader, task
    for ending, (_, loader, task) in ENDINGS.items():
        if architecture.endswith(ending):
            return loader, task
    return auto.AutoModelForCausalLM, "causal_lm"


def _listed(names: Any, architecture: str) -> bool:
    return any(architecture == name or (isinstance(name, (tuple, list)) and architecture in name) for name in names.values())


def _maps(loader: Any, config: Any) -> bool:
    return type(config) in loader._model_mapping or bool(getattr(config, "auto_map", None))


def _headed(config: Any, task: str, source: str) -> Choice:
    """The class of a task with a head: the library's, else one made of its bare model and a linear head."""
    if task not in HEADS:
        raise RequestError(f"model.task: {task!r} is none; tasks: auto, causal_lm, {', '.join(HEADS)}")
    loader = HEADS[task]
    if _maps(loader, config):
        return Choice(loader, task)
    if task == "embedding" or type(config) not in auto.AutoModel._model_mapping:
        raise RequestError(f"model {source}: the transformers library has no {task} model of type {config.model_type!r}")
    return Choice(Named(make_head(config, task)), task, made=True)


def make_head(config: Any, task: str) -> type:
    """`XForSequenceClassification` or `XForTokenClassification` for a family that the library has no such class of: its bare
    model, and a linear head on the last state of each row (or on every state) without padding."""
    bare = auto.AutoModel._model_mapping[type(config)]
    bare = bare[0] if isinstance(bare, (tuple, list)) else bare
    ancestor = next(cls for cls in bare.__mro__ if cls.__name__.endswith("PreTrainedModel"))
    generic = GenericForTokenClassification if task == "token_classification" else GenericForSequenceClassification
    name = bare.__name__.removesuffix("Model") + generic.__name__.removeprefix("Generic")
    # The names under which checkpoints of the family hold their weights are known to the library by class.
    generators = {**auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES}
    for known in (generators.get(config.model_type), config.model_type):
        if renamings := get_checkpoint_conversion_mapping(known):
            register_checkpoint_conversion_mapping(name, renamings, overwrite=True)
            break
    return type(name, (generic, ancestor), {"config_class": type(config), "__module__": __name__})


class Named:
    """A model class with the two methods of an Auto class."""

    def __init__(self, model_class: Any) -> None:
        self.model_class = model_class

    def from_pretrained(self, source: str, trust_remote_code: bool = False, **kwargs: Any) -> Any:
        return self.model_class.from_pretrained(source, **kwargs)

    def from_config(self, config: Any, trust_remote_code: bool = False, **kwargs: Any) -> Any:
        return self.model_class._from_config(config, **kwargs)
