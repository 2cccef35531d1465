"""A checkpoint's own processor, as the templates use it: texts with media to ids, loss weights and tensors.

A text goes through the processor alone, with its media, in training as in inference. What the processor returns for each text
is put together to batches by what it is: values for each token, for each row, or for each medium. Shapes: B rows, T tokens.
"""

from __future__ import annotations

import copy
import inspect
import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, NamedTuple

import torch
from swift_core.config import build_options
from swift_core.errors import RunError, SwiftError
from swift_core.types import Batch, Row, Sample

from swift_plugin_transformers.alignment import mapped_back, matched
from swift_plugin_transformers.collation import collate
from swift_plugin_transformers.config import MediaOptions
from swift_plugin_transformers.loss_weights import Piece, token_weights
from swift_plugin_transformers.media import KINDS, Decoded, MediaError, Placed, collect, decode, frozen, name_of
from swift_plugin_transformers.tensors import Layout, join, tensors_of

NAMED = re.compile(r"image|video|audio|vision|boi|boa|bov|img")  # attributes of a processor that hold a placeholder
SHAPED = re.compile(r"<\|?(?:image|video|audio)(?:_\d+)?\|?>|\[IMG\]")
TRIES = 8  # sizes tried to keep a medium within `max_tokens`
FLAT = {"GotOcr2Processor", "IdeficsProcessor"}  # those that read a list in a list as pages of one picture, or set it last
ALWAYS_SEES = {"IdeficsProcessor"}  # whose model asks for pictures in every pass; one that no token sees, where there is none
PLACES_ITSELF = {"Florence2Processor"}  # those that put the place of a picture into the text themselves
VIDEOS_AS_IMAGES = {"InstructBlipVideoProcessor"}  # those that take their videos by the name `images`
TOLD = {  # what some processors must be told, to leave the end of the text alone or to say all that the model needs
    "ChameleonProcessor": {"return_for_text_completion": True},
    "Cosmos3EdgeProcessor": {"return_mm_token_type_ids": True},
}
OURS = ("input_ids", "attention_mask", "offset_mapping", "text_replacement_offsets", "video_metadata", "labels")


def open_media(processor: Any, raw: dict[str, Any], render: Callable[[list[Row]], str]) -> Multimodal | None:
    """The media side of a processor; None for a tokenizer. Raises RequestError for bad options."""
    options = build_options(MediaOptions, raw, "template.media") or MediaOptions()
    return Multimodal(processor, options, render) if takes(processor) else None


def takes(processor: Any) -> set[str]:
    """The kinds of media that a processor takes; none for a tokenizer."""
    if not hasattr(processor, "tokenizer"):
        return set()
    parts = {"image": ("image_processor",), "video": ("video_processor",), "audio": ("audio_processor", "feature_extractor")}
    return {kind for kind, names in parts.items() if any(getattr(processor, name, None) is not None for name in names)}


class Made(NamedTuple):
    """An expanded text: its ids, their weights, and the kind and tokens of each medium in the order of the text."""

    ids: list[int]
    weights: list[float]
    counts: list[tuple[str, int]]


class Multimodal:
    """Texts with media to ids, weights and tensors. `render` gives the text of messages, for what is learnt by trying."""

    def __init__(self, processor: Any, options: MediaOptions, render: Callable[[list[Row]], str]) -> None:
        self.processor, self.options, self.render = processor, options, render
        self.tokenizer, self.kinds = processor.tokenizer, takes(processor)
        self.tells: bool | None = None  # whether the processor tells what it replaced; found by the first text with media
        self._pool: ThreadPoolExecutor | None = None
        self._copies = threading.local()
        self._process = os.getpid()

    # --- rows -----------------------------------------------------------------------------------------------------

    def collect(self, row: Row) -> tuple[list[Row], list[Placed]]:
        """A row's messages with bare media parts, and the media of each. Raises ValueError."""
        messages, media = collect(row)
        self._check_texts(messages)
        media = [[(kind, frozen(reference, kind)) for kind, reference in placed] for placed in media]
        if self.options.video_as_images:
            messages, media = self._unfold(messages, media)
        lacking = sorted({kind for placed in media for kind, _ in placed} - self.kinds)
        if lacking:
            hint = "; template.media.video_as_images=true shows its frames" if lacking == ["video"] else ""
            raise ValueError(f"the row has {KINDS[lacking[0]]}, which this checkpoint's processor does not take{hint}")
        return messages, media

    def _check_texts(self, messages: list[Row]) -> None:
        """Raise ValueError for a text with a token that stands for a medium: the model would look for one."""
        for n, message in enumerate(messages):
            content = message.get("content")
            parts = content if isinstance(content, list) else [{"text": content}]
            texts = [str(part.get("text") or "") if isinstance(part, dict) else str(part) for part in parts]
            words = (match[0] for text in texts for match in self.placeholders.finditer(text))
            if word := next((word for word in words if word in self._added), None):
                raise ValueError(
                    f"the text of messages[{n}] has {word}, which this checkpoint takes for the place of an image, a video or "
                    "a sound; give the row its media, or take it out"
                )

    @cached_property
    def _added(self) -> frozenset[str]:
        return frozenset(self.tokenizer.get_added_vocab())

    def _unfold(self, messages: list[Row], media: list[Placed]) -> tuple[list[Row], list[Placed]]:
        """Videos as so many pictures."""
        unfolded, shown = [], []
        for message, placed in zip(messages, media, strict=True):
            parts, found, waiting = [], Placed(), iter(placed)
            for part in message["content"] if placed else ():
                kind, reference = next(waiting) if part.get("type") in KINDS else (None, None)
                if kind != "video":
                    parts.append(part)
                    found += [(kind, reference)] if kind else []
                    continue
                count = len(self._frames(reference))
                parts += [{"type": "image"}] * count
                found += [("image", {"video": reference, "frame": n}) for n in range(count)]
            unfolded.append({**message, "content": parts} if placed else message)
            shown.append(found)
        return unfolded, shown

    def _frames(self, reference: Any) -> list[Any]:
        return decode([("video", reference)], self.rate, self.options).videos[0]  # type: ignore[no-any-return]

    def encode(self, text: str, placed: Placed, pieces: Sequence[Piece]) -> tuple[list[int], list[float], dict[str, list[Any]]]:
        """Ids and weights of a text whose media the processor expands, and the references to make its tensors from again.

        Raises MediaError for a file that cannot be read, ValueError where the mask cannot be placed.
        """
        if not placed:
            encoded = self.tokens(text, offsets=True)
            return list(encoded["input_ids"]), token_weights(encoded["offset_mapping"], pieces), {}
        expansion, placed = self._fitted(text, placed, pieces)
        media = {KINDS[kind]: [ref for other, ref in placed if other == kind] for kind in KINDS}
        return expansion.ids, expansion.weights, {key: found for key, found in media.items() if found}

    def _fitted(self, text: str, placed: Placed, pieces: Sequence[Piece]) -> tuple[Made, Placed]:
        """The expanded text, and its media shrunk to `max_tokens` each. Raises ValueError."""
        for _ in range(TRIES):
            expansion = self._expand(text, decode(placed, self.rate, self.options), pieces)
            tight = self._within_budget(placed, expansion.counts)
            if tight is None:
                return expansion, placed
            if tight == placed:
                break
            placed = tight
        raise ValueError("this processor makes more tokens of it than template.media.max_tokens, whatever its size")

    def _within_budget(self, placed: Placed, counts: list[tuple[str, int]]) -> Placed | None:
        """The media with those shrunk that take too many tokens; None where none does."""
        limit = self.options.max_tokens
        if limit is None or all(count <= limit for _, count in counts):
            return None
        if sorted(kind for kind, _ in counts) != sorted(kind for kind, _ in placed):
            raise ValueError("template.media.max_tokens: this processor does not tell the tokens of each medium")
        by_kind = {kind: iter([count for other, count in counts if other == kind]) for kind in KINDS}
        found: Placed = []
        for kind, reference in placed:
            count = next(by_kind[kind])
            if count > limit:
                scale, inner = (reference["scale"], reference["ref"]) if _wrapped(reference) else (1.0, reference)
                reference = {"ref": inner, "scale": scale * limit / count * 0.98}
            found.append((kind, reference))
        return found

    # --- the processor --------------------------------------------------------------------------------------------

    @cached_property
    def rate(self) -> int:
        """Sound samples a second that the processor hears."""
        part = getattr(self.processor, "audio_processor", None) or getattr(self.processor, "feature_extractor", None)
        return int(getattr(part, "sampling_rate", None) or 16000)

    def tokens(self, text: str, offsets: bool = False) -> Any:
        """A text without media, tokenized as the processor does."""
        return self.tokenizer(text, add_special_tokens=self._adds(text), return_offsets_mapping=offsets)

    def _adds(self, text: str) -> bool:
        """The tokenizer's own first and last tokens are added, unless the template wrote the first."""
        bos = self.tokenizer.bos_token
        return bos is None or not text.startswith(bos)

    def call(self, text: str | None, media: Decoded, processor: Any = None, **more: Any) -> dict[str, Any]:
        """What the processor makes of one text, or of media alone: tensors, with a first dimension of 1 where it counts
        texts."""
        name = type(self.processor).__name__
        arguments: dict[str, Any] = {**TOLD.get(name, {}), **self.options.processor, **more}
        arguments |= {} if text is None else {"text": [text]}
        if text is not None and not self._adds(text):
            arguments["add_special_tokens"] = False
        if media.images:
            arguments["images"] = media.images if name in FLAT else [media.images]
        if media.videos and name in VIDEOS_AS_IMAGES:
            arguments["images"] = media.videos
        elif media.videos:
            arguments.update(videos=[media.videos], video_metadata=media.metadata, do_sample_frames=False)
        if media.audios:
            arguments.update(audio=media.audios, sampling_rate=self.rate)
        self._calm()
        use = processor or self.processor
        try:
            return dict(use(**arguments, return_tensors="pt"))
        except ValueError as err:
            if "tensor" not in str(err):
                raise
        return dict(use(**arguments))  # pictures of several sizes: `tensors_of` pads them

    def _calm(self) -> None:
        """One thread for torch in a process that was forked: those of its parent are not there."""
        if os.getpid() != self._process:
            self._process = os.getpid()
            torch.set_num_threads(1)

    def _expand(self, text: str, media: Decoded, pieces: Sequence[Piece]) -> Made:
        """Ids, weights and tokens of each medium. Raises ValueError."""
        if self.tells is not False:
            try:
                told = self._told(text, media, pieces)
                self.tells = True
                if told is not None:
                    return told
            except SwiftError:
                raise
            except Exception as err:
                if self.tells:
                    raise _refusal(err) from err
        try:
            out = self.call(text, media)
        except SwiftError:
            raise
        except Exception as err:
            raise _refusal(err) from err
        self.tells = bool(self.tells)
        if not pieces:  # nothing of it is trained: which token comes from which character does not matter
            return Made(_ids(out), [0.0] * len(_ids(out)), [("?", 0)])
        plain = self.tokens(text, offsets=True)
        offsets, spots = plain["offset_mapping"], [found.span() for found in self.placeholders.finditer(text)]
        marks = [any(begin < stop and end > start for start, stop in spots) for begin, end in offsets]
        found = matched(plain["input_ids"], token_weights(offsets, pieces), marks, _ids(out))
        names = [kind for kind in KINDS for _ in getattr(media, KINDS[kind])]
        known = len(set(names)) == 1 and len(found.counts) == len(names)
        counts = list(zip(names, found.counts, strict=True)) if known else [("?", max(found.counts, default=0))]
        return Made(found.ids, found.weights, counts)

    def _told(self, text: str, media: Decoded, pieces: Sequence[Piece]) -> Made | None:
        """From the spans that the processor says it replaced; None where it changed more of the text than those. Raises
        KeyError where it says nothing."""
        out = self.call(text, media, return_offsets_mapping=True, return_text_replacement_offsets=True)
        spans = out["text_replacement_offsets"][0]
        if not spans:
            raise KeyError("text_replacement_offsets")
        starts = [0, *(span["span"][1] for span in spans)]
        kept = [text[start : span["span"][0]] for start, span in zip(starts, spans, strict=False)]
        whole = (
            "".join(part for k, span in zip(kept, spans, strict=True) for part in (k, span["replacement"])) + text[starts[-1] :]
        )
        if list(self.tokenizer(whole, add_special_tokens=self._adds(text))["input_ids"]) != _ids(out):
            return None
        replaced = [(*span["span"], *span["new_span"]) for span in spans]
        offsets, counts = mapped_back([tuple(pair) for pair in torch.as_tensor(out["offset_mapping"])[0].tolist()], replaced)
        kinds = [span["type"] for span in spans]
        return Made(_ids(out), token_weights(offsets, pieces), list(zip(kinds, counts, strict=True)))

    @cached_property
    def placeholders(self) -> re.Pattern[str]:
        """What stands for a medium in a text before it is expanded."""
        found = set()
        for holder in (self.processor, self.tokenizer):
            attributes = {**vars(holder), **(getattr(holder, "special_tokens_map", None) or {})}
            found |= {str(value) for key, value in attributes.items() if isinstance(value, str) and NAMED.search(key)}
        known = self.tokenizer.get_vocab()
        known = {word for word in known if word in self._added or re.search(r"\W", word)}  # "default" is no placeholder
        words = sorted((word for word in found if 1 < len(word) <= 64 and word in known), key=len, reverse=True)
        return re.compile("|".join([*map(re.escape, words), SHAPED.pattern]))

    @cached_property
    def placeholder_ids(self) -> list[int]:
        """Tokens that stand for a medium or a part of it, which no answer may hold."""
        return [number for word, number in self.tokenizer.get_added_vocab().items() if self.placeholders.fullmatch(word)]

    # --- batches --------------------------------------------------------------------------------------------------

    def collate(self, samples: Sequence[Sample], pad_id: int) -> Batch:
        """The batch of some samples, or of one packed sample, with the tensors of its media."""
        batch = collate(samples, pad_id)
        parts: list[Sample] = [part for sample in samples for part in sample.media.get("samples", [sample])]
        rows = [n for n, sample in enumerate(samples) for _ in sample.media.get("samples", [sample])]
        found = self._each(parts)
        if any(found) or self.extras:
            starts = [0] * len(parts)
            for n in range(1, len(parts)):
                starts[n] = starts[n - 1] + len(parts[n - 1].input_ids) if rows[n] == rows[n - 1] else 0
            places = [(row, start, len(part.input_ids)) for row, start, part in zip(rows, starts, parts, strict=True)]
            size = (len(samples), batch.labels.shape[1])
            batch.inputs.update(self._with_blanks(join(found, places, size, self.extras, self.layout), size))
            self._mark_answers(batch, places)
        return batch

    def _mark_answers(self, batch: Batch, places: list[tuple[int, int, int]]) -> None:
        """Where token_type_ids tell a prompt, all of which sees itself, from an answer: 1 from its first trained token."""
        if not self.tells_answers or "token_type_ids" not in batch.inputs:
            return
        for row, start, length in places:
            trained = batch.weights[row, start : start + length].nonzero()
            if len(trained):
                batch.inputs["token_type_ids"][row, start + int(trained[0]) : start + length] = 1

    @cached_property
    def tells_answers(self) -> bool:
        """Whether the processor takes the answer apart from the prompt, as PaliGemma's does."""
        return "suffix" in inspect.signature(type(self.processor).__call__).parameters

    def _each(self, parts: list[Sample]) -> list[dict[str, torch.Tensor]]:
        if self.options.workers and sum(bool(part.media) for part in parts) > 1:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self.options.workers, "media")
            return list(self._pool.map(lambda part: self._features(part, self._own()), parts))
        return [self._features(part, self._own()) for part in parts]

    def _own(self) -> Any:
        """This thread's processor: a tokenizer must not be used by two threads at once."""
        if threading.current_thread() is threading.main_thread():
            return self.processor
        if not hasattr(self._copies, "processor"):
            self._copies.processor = copy.deepcopy(self.processor)
        return self._copies.processor

    def _features(self, sample: Sample, processor: Any) -> dict[str, torch.Tensor]:
        """Tensors of one sample's media. Raises RunError naming the row where a file is not what it was."""
        if not sample.media:
            return {}
        placed = [(kind, reference) for kind, key in KINDS.items() for reference in sample.media.get(key, ())]
        try:
            out = self.call(sample.text, decode(placed, self.rate, self.options), processor)
        except MediaError as err:
            raise RunError(f"{sample.where}: {err}; it could be read when the row was prepared") from err
        ids, length = _ids(out), len(sample.input_ids)
        if ids != sample.input_ids[: len(ids)]:  # the text may be a prompt, to whose ids an answer's were added
            files = ", ".join(name_of(reference) for _, reference in placed)
            raise RunError(
                f"{sample.where}: its media make {len(ids)} tokens, and made {length} when the row was "
                f"prepared: has a file changed? ({files})"
            )
        found = tensors_of({key: value for key, value in out.items() if key not in OURS})
        return {key: longer(value, len(ids), length) for key, value in found.items()}

    def inputs(self, text: str, placed: Placed) -> dict[str, torch.Tensor]:
        """What a model's forward or generate takes for one text."""
        if not placed:
            found: dict[str, torch.Tensor] = {}
            ids = list(self.tokens(text)["input_ids"])
        else:
            if self.options.max_tokens is not None:
                placed = self._fitted(text, placed, [(0, 0, 0.0)])[1]
            out = self.call(text, decode(placed, self.rate, self.options))
            ids, found = _ids(out), tensors_of({key: value for key, value in out.items() if key not in OURS})
        tokens = torch.tensor([ids])
        joined = join([found], [(0, 0, len(ids))], (1, len(ids)), self.extras, self.layout) if found or self.extras else {}
        joined = self._with_blanks(joined, (1, len(ids)))
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **joined}

    def seen(self, placed: Placed, where: str = "", processor: Any = None) -> dict[str, torch.Tensor]:
        """Tensors of the one medium that a model reads whose encoder takes no text. Raises ValueError, MediaError, and RunError
        naming the row `where` a file is not what it was."""
        if len(placed) != 1:
            kinds = " or ".join(sorted(self.kinds))
            raise ValueError(f"this model's encoder reads one {kinds} and no text, and the prompt has {len(placed)} of them")
        try:
            out = self.call(None, decode(placed, self.rate, self.options), processor or self._own())
        except MediaError as err:
            if where:
                raise RunError(f"{where}: {err}; it could be read when the row was prepared") from err
            raise
        ours = ("input_ids", "labels", "decoder_input_ids", "decoder_attention_mask")  # the decoder begins with the row's text
        return tensors_of({key: value for key, value in out.items() if key not in ours})

    # --- what is learnt by trying ---------------------------------------------------------------------------------

    @cached_property
    def extras(self) -> tuple[str, ...]:
        """Values for each token that the processor gives for a text without media too, such as token_type_ids; all 0."""
        try:
            out = self.call(self.render([{"role": "user", "content": "a"}]), Decoded(), self._own())
        except Exception:
            return ()
        found = tensors_of({key: value for key, value in out.items() if key not in OURS})
        length = len(_ids(out))
        return tuple(key for key, value in found.items() if tuple(value.shape[:2]) == (1, length) and not value.any())

    @cached_property
    def blanks(self) -> dict[str, torch.Tensor]:
        """What a processor of `ALWAYS_SEES` makes of a text without media, [1, T, ...] or [1, ...]: zeros."""
        if type(self.processor).__name__ not in ALWAYS_SEES:
            return {}
        out = self.call(self.render([{"role": "user", "content": "a"}]), Decoded(), self._own())
        return tensors_of({key: value for key, value in out.items() if key not in OURS})

    def _with_blanks(self, joined: dict[str, torch.Tensor], size: tuple[int, int]) -> dict[str, torch.Tensor]:
        """The tensors of a batch of `size` (B, T), and a blank picture that no token sees where it has none."""
        if not self.blanks or self.blanks.keys() - set(self.extras) <= joined.keys():
            return joined
        zeros = {
            key: value.new_zeros((*size, *value.shape[2:]) if key in self.extras else (size[0], *value.shape[1:]))
            for key, value in self.blanks.items()
        }
        return {**joined, **zeros}

    @cached_property
    def layout(self) -> Layout:
        """Which tensors count rows first. Two pictures in one text tell: a tensor with a first dimension of 1 counts rows,
        unless it is 1 for two texts too, and another dimension grows."""
        rows: set[str] = set()
        along: dict[str, int] = {}
        for kind in sorted(self.kinds):
            found = {key: value for key, value in self._tried(kind).items() if value.ndim > 1 and value.shape[0] == 1}
            if kind == "image" and any(value.ndim > 3 for value in found.values()):
                along |= self._grown(found)
            rows |= {key for key in found if not key.startswith("qformer_")} - along.keys()  # those: a question a picture
        rows |= self.blanks.keys() - set(self.extras)
        return Layout(frozenset(rows), along)

    def _grown(self, found: dict[str, torch.Tensor]) -> dict[str, int]:
        """Of tensors of a text with two pictures, those that two texts with one each make too, and the dimension in which
        the pictures follow each other there."""
        from PIL import Image

        try:
            text = self.render([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}])
            pictures = [[Image.new("RGB", size, (90, 120, 30))] for size in ((96, 64), (64, 96))]
            two = tensors_of(dict(self._own()(text=[text, text], images=pictures, return_tensors="pt", padding=True)))
            one = tensors_of(dict(self._own()(text=[text], images=pictures[:1], return_tensors="pt")))
        except Exception:
            return {}
        same = [key for key, value in found.items() if value.ndim > 3 and key in two and two[key].shape == value.shape]
        grown = {key: [d for d in range(1, found[key].ndim) if one[key].shape[d] != two[key].shape[d]] for key in same}
        return {key: dimensions[0] for key, dimensions in grown.items() if len(dimensions) == 1}

    def _tried(self, kind: str) -> dict[str, torch.Tensor]:
        """The tensors of a text with two small media of a kind; nothing where the processor does not take two."""
        from PIL import Image

        pictures = [Image.new("RGB", size, (90, 120, 30)) for size in ((96, 64), (64, 96))]
        references: list[Any] = [frozen(picture, "image") for picture in pictures]
        if kind == "audio":
            references = [frozen({"array": [0.1, -0.1] * self.rate, "sampling_rate": self.rate}, "audio")] * 2
        if kind == "video":
            references = [[references[0]] * 4] * 2
        parts: list[Row] = [{"type": kind}, {"type": kind}, {"type": "text", "text": "a"}]
        try:
            text = self.render([{"role": "user", "content": parts}])
            media = decode([(kind, reference) for reference in references], self.rate, self.options)
            out = self.call(text, media, self._own())
        except Exception:
            return {}
        length = len(_ids(out))
        found = tensors_of({key: value for key, value in out.items() if key not in OURS})
        return {key: value for key, value in found.items() if tuple(value.shape[:2]) != (1, length)}


def _ids(out: dict[str, Any]) -> list[int]:
    ids = out["input_ids"][0]
    return ids.tolist() if hasattr(ids, "tolist") else [int(token) for token in ids]


def longer(tensor: torch.Tensor, length: int, wanted: int) -> torch.Tensor:
    """A tensor with values for each of `length` tokens, [1, length, ...], as one for `wanted`: more text has what the last
    token has. Any other stays as it is."""
    if wanted == length or tuple(tensor.shape[:2]) != (1, length):
        return tensor
    return torch.cat([tensor, tensor[:, -1:].expand(-1, wanted - length, *tensor.shape[2:])], 1)


def _wrapped(reference: Any) -> bool:
    return isinstance(reference, dict) and "ref" in reference


def _refusal(err: Exception) -> ValueError:
    return ValueError(f"the checkpoint's processor refuses the row: {' '.join(str(err).split()) or type(err).__name__}")
