"""Loads tokenizers, and for models that take images, videos or sound the processor that holds one.

Images need pillow only. A video processor of the transformers library needs torchvision: without it the processor is put
together of its other parts, and says so where a video comes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import transformers
from swift_core.errors import RequestError
from transformers import AutoConfig, AutoFeatureExtractor, AutoImageProcessor, AutoProcessor, AutoTokenizer, GenerationConfig
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import PushToHubMixin, is_torchvision_available

from swift_plugin_transformers.architectures import is_multimodal, needs_own_code
from swift_plugin_transformers.config import TransformersConfig

FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
TORCHVISION = "needs torchvision. Get it: pip install torchvision"
PARTS = {"tokenizer": AutoTokenizer, "image_processor": AutoImageProcessor, "feature_extractor": AutoFeatureExtractor}


def load_processor(source: str, config: TransformersConfig) -> Any:
    """The processor of a multimodal folder or hub id, else its tokenizer. Raises RequestError when there is none."""
    where = where_from(source, config)
    try:
        if kind := _processor_class(source, config, where):
            return _with_start(_load(kind, source, config, where), source, config, where)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=config.trust_remote_code, **where)
        return _with_start(tokenizer, source, config, where)
    except Exception as err:
        folder = Path(source)
        if needs_own_code(folder) and not config.trust_remote_code:
            raise own_code(source) from err
        what = "processor" if any((folder / name).is_file() for name in FILES) else "tokenizer"
        lacks = what == "tokenizer" and folder.is_dir() and not (folder / "tokenizer.json").is_file()
        why = "the folder holds no tokenizer.json" if lacks else first_line(err)
        if "torchvision" in str(err).lower():
            why = f"it {TORCHVISION}"
        if not folder.exists():
            why = f"there is no such folder, and as a hub id: {why}"
        raise RequestError(f"model {source}: its {what} cannot be loaded: {why}") from err


def _with_start(processor: Any, source: str, config: TransformersConfig, where: dict[str, Any]) -> Any:
    """The processor; that of an encoder-decoder knows as `decoder_start` the token that its decoder starts with, as the
    library's generation finds it, or None. Templates see by it that a prompt is read by an encoder."""
    try:
        found = AutoConfig.from_pretrained(source, trust_remote_code=config.trust_remote_code, **where)
    except Exception:
        return processor  # what is wrong with it is told where the model is loaded
    try:
        generation: Any = GenerationConfig.from_pretrained(source, **where)
    except OSError:
        generation = None
    mark_encoder_decoder(processor, found, generation)
    return processor


def mark_encoder_decoder(processor: Any, config: Any, generation: Any = None, name: str | None = None) -> None:
    """Let the tokenizer of an encoder-decoder know the token that its decoder starts with, and whether its encoder takes text.
    name: of its class, by default the configuration's."""
    if not getattr(config, "is_encoder_decoder", False):
        return
    parts = [generation, config, config.get_text_config(decoder=True)]
    starts = [getattr(part, f"{name}_token_id", None) for name in ("decoder_start", "bos") for part in parts]
    tokenizer = getattr(processor, "tokenizer", processor)
    tokenizer.decoder_start = next((start for start in starts if start is not None), None)
    kind = getattr(transformers, name or next(iter(config.architectures or ()), ""), None)
    tokenizer.encoder_reads_text = getattr(kind, "main_input_name", "input_ids") == "input_ids"


def where_from(source: str, config: TransformersConfig) -> dict[str, Any]:
    return {"local_files_only": True} if Path(source).is_dir() else {"revision": config.revision or "main"}


def own_code(source: str) -> RequestError:
    return RequestError(
        f"model {source} needs Python code of its own, which the transformers library does not have: read it, and let it run "
        "with --trust-remote-code"
    )


def first_line(err: Exception) -> str:
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    return f"{type(err).__name__}: {lines[0] if lines else ''}"


def _processor_class(source: str, config: TransformersConfig, where: dict[str, Any]) -> Any:
    """The class that holds a multimodal model's tokenizer and media processors; None where the tokenizer is all there is."""
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).is_file() for name in FILES):
        return None
    try:
        model_config = AutoConfig.from_pretrained(source, trust_remote_code=config.trust_remote_code, **where)
    except Exception:
        return None  # what is wrong with it is told where the model is loaded
    if not is_multimodal(model_config):
        return None
    if getattr(model_config, "auto_map", None) and config.trust_remote_code:
        return AutoProcessor
    return PROCESSOR_MAPPING.get(type(model_config), None) or _named(folder) or AutoProcessor


def _load(kind: Any, source: str, config: TransformersConfig, where: dict[str, Any]) -> Any:
    named = _named(Path(source))
    if named is not None and kind is not AutoProcessor:
        kind = named
    parts = kind.get_attributes() if kind is not AutoProcessor else []
    if "video_processor" not in parts or is_torchvision_available():
        return AutoProcessor.from_pretrained(source, trust_remote_code=config.trust_remote_code, **where)
    settings, _ = kind.get_processor_dict(source, **where)
    loaded = [
        without_videos(_video_settings(Path(source), settings), kind.__name__) if part == "video_processor"
        else PARTS[part].from_pretrained(source, **where) for part in parts
    ]  # fmt: skip
    return _lenient(kind).from_args_and_dict(loaded, settings)


def _lenient(kind: Any) -> Any:
    """The class under its own name, taking what stands for a video processor without looking at its class."""

    def check(self: Any, name: str, argument: Any) -> Any:
        stands = getattr(argument, "refuses_videos", False)
        return type(argument) if stands else kind.check_argument_for_proper_class(self, name, argument)

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": check, "__module__": kind.__module__})


def _named(folder: Path) -> Any:
    """The processor class that a folder's files name, where the library has it."""
    for name in (*FILES, "tokenizer_config.json"):
        named = _read(folder / name).get("processor_class")
        found = getattr(transformers, str(named), None) if named else None
        if found is not None and hasattr(found, "get_attributes"):
            return found
    return None


def _video_settings(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What the folder says of its video processor, so that saving writes it again."""
    return settings.get("video_processor") or _read(folder / FILES[2]) or _read(folder / FILES[1])


def _read(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def without_videos(settings: dict[str, Any], owner: str) -> Any:
    """Stands where a processor expects its video processor: its settings can be read and saved, a video is refused."""

    class NoVideos(PushToHubMixin):
        refuses_videos = True
        _auto_class = None
        model_input_names: tuple[str, ...] = ()

        def __init__(self) -> None:
            self.__dict__.update({key: value for key, value in settings.items() if key != "auto_map"})

        def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
            raise RequestError(f"{owner}: a video {TORCHVISION}")

        def to_dict(self) -> dict[str, Any]:
            return dict(settings)

    return NoVideos()
