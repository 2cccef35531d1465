"""Options of the generic model loader and of its templates. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from swift_core.config import option


@dataclass
class TransformersConfig:
    """`model: {name: FOLDER, attention: eager}`. The last two are the run's flags, set by the session."""

    task: Literal["auto", "causal_lm", "sequence_classification", "token_classification", "embedding", "reranker", "reward"] = (
        option("auto", "what the model's head does; auto is what its config.json says")
    )
    num_labels: int | None = option(
        None,
        "classes of a head, or numbers of a regression; default: as many as labels, else 1 number, else config.json's",
    )
    labels: list[str] = option([], "names of the classes, in the order of their numbers; rows may then name them")
    problem: Literal["single_label", "multi_label", "regression"] | None = option(
        None, "what sequence classification predicts: one class, a set of classes, or num_labels numbers"
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = option("auto", "attention implementation")
    revision: str | None = option(None, "branch, tag or commit of a hub id")
    trust_remote_code: bool = field(init=False, default=False)
    allow_pickle: bool = field(init=False, default=False)


@dataclass
class ChatTemplateConfig:
    """`template: {kwargs: {enable_thinking: false}}`."""

    file: str | None = option(None, "a .jinja file to use instead of the checkpoint's template")
    jinja: str | None = option(None, "a chat template as text, instead of the checkpoint's")
    variant: str | None = option(None, "which of the checkpoint's named templates; by default tool_use where there are tools")
    kwargs: dict[str, Any] = option({}, "arguments given to the template; a row's chat_template_kwargs go before them")
    loss: Literal["assistant", "last", "all", "spans"] = option(
        "assistant", "what is trained: every answer, the last one, every token, or answers weighted by template.spans"
    )
    spans: dict[str, float] = option({}, "regular expression: factor of the weight of what it matches in an answer")
    grounding: dict[str, Any] = option({}, "how boxes are written: box, point, ref, scale [the family's, else thousandths]")
    media: dict[str, Any] = option({}, "images, videos, sounds: max_pixels, fps, max_frames, on_error, ... (see MediaOptions)")


@dataclass
class PlainTemplateConfig:
    """`template: {name: plain}`."""

    end: bool = option(True, "add the end-of-text token to each row")
    media: dict[str, Any] = option({}, "images, videos, sounds: max_pixels, fps, max_frames, on_error, ... (see MediaOptions)")


@dataclass
class MediaOptions:
    """`template: {media: {max_pixels: 500000, on_error: skip}}`."""

    on_error: Literal["stop", "skip"] = option("stop", "an unreadable file stops the run, or its row is skipped and counted")
    allow_urls: bool = option(False, "fetch media from the web; each is fetched once, into the cache")
    min_pixels: int | None = option(None, "enlarge a smaller picture or frame to so many pixels")
    max_pixels: int | None = option(None, "shrink a larger picture or frame to so many pixels")
    max_tokens: int | None = option(None, "tokens of one picture, video or sound: it is shrunk until it fits")
    fps: float = option(2.0, "frames a second that are taken of a video")
    max_frames: int = option(32, "frames that are taken of a video at most")
    max_seconds: float | None = option(None, "how much of a sound is heard: what is longer is cut")
    video_as_images: bool = option(False, "show a video as its frames, to a model that takes pictures only")
    processor: dict[str, Any] = option({}, "arguments given to the checkpoint's processor as they are")
    workers: int = option(2, "threads that decode in each rank; 0: none")
    prefetch: int = option(2, "steps whose media are decoded in advance; 0: none")

    def __post_init__(self) -> None:
        for name in ("min_pixels", "max_pixels", "max_tokens", "max_frames", "fps", "max_seconds"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}: expected more than 0, not {value}")
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels: {self.min_pixels} is above max_pixels, {self.max_pixels}")
        if self.workers < 0 or self.prefetch < 0:
            raise ValueError("workers and prefetch are 0 or more")


@dataclass
class TaskTemplateConfig:
    """`template: {name: classify, max_length: 512}`. The first three are the model's own options, taken from there."""

    labels: list[str] = option([], "names of the classes, in the order of their numbers; default: model.labels")
    num_labels: int | None = option(None, "number of classes; default: model.num_labels")
    problem: Literal["single_label", "multi_label", "regression"] | None = option(
        None, "what labels are; default: model.problem, else what the row's label looks like"
    )
    max_length: int | None = option(None, "tokens of a text at most: what is longer is cut, its special tokens kept")
    chat: bool | None = option(None, "render by the chat template; default: where a row has several messages")


@dataclass
class EmbedTemplateConfig(TaskTemplateConfig):
    """`template: {name: embed, pooling: mean}`."""

    pooling: Literal["auto", "mean", "last", "cls"] = option(
        "auto", "which states make the vector: auto is mean where the tokenizer has a CLS token, else last"
    )
    query_prefix: str = option("", "a text before each query, such as an instruction")
    document_prefix: str = option("", "a text before each document")
