"""Pictures, videos and sounds of a row: references first, pixels and samples only when they are needed.

A reference is a path, a data URI, bytes or, where the run allows it, a URL; what is held in memory becomes bytes. References
travel with the prepared samples; each is decoded once when its row is prepared, and again when a batch is made.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import math
import os
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from swift_core.cache import cache_folder
from swift_core.types import Row

from swift_plugin_transformers.config import MediaOptions

KINDS = {"image": "images", "video": "videos", "audio": "audios"}  # a content part's type, and its key of a row
OWN = ("url", "path", "bytes", "base64", "data")  # where a content part may hold its reference, beside its own type
Placed = list[tuple[str, Any]]  # the media of a message: kind and reference, in order


class MediaError(ValueError):
    """A file that cannot be read. With `skip`, its row is left out and counted even where bad rows stop the run."""

    def __init__(self, reason: str, skip: bool = False) -> None:
        super().__init__(reason)
        self.skip, self.what = skip, "unreadable media"


@dataclass
class Decoded:
    """What a processor is given for one text."""

    images: list[Any] = field(default_factory=list)  # PIL, RGB
    videos: list[Any] = field(default_factory=list)  # uint8 arrays [frames, height, width, 3]
    metadata: list[dict[str, Any]] = field(default_factory=list)  # of each video: where its frames come from
    audios: list[Any] = field(default_factory=list)  # float32 arrays [samples]

    def __bool__(self) -> bool:
        return bool(self.images or self.videos or self.audios)


# --- references -------------------------------------------------------------------------------------------------------


def collect(row: Row) -> tuple[list[Row], list[Placed]]:
    """A row's messages with bare media parts, and the media of each message.

    A part without a reference takes the next one of the row's list. Raises ValueError where the counts differ.
    """
    lists = {kind: _listed(row.get(key)) for kind, key in KINDS.items()}
    taken, placed = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    messages: list[Row] = []
    media: list[Placed] = []
    for message in row["messages"]:
        content, found = message.get("content"), Placed()
        if isinstance(content, list):
            parts = []
            for part in content:
                kind = part_kind(part)
                if kind is None:
                    parts.append(part)
                    continue
                own = _own(part, kind)
                if own is None:
                    placed[kind] += 1
                    own = lists[kind][taken[kind]] if taken[kind] < len(lists[kind]) else None
                    taken[kind] += 1
                found.append((kind, own))
                parts.append({"type": kind})
            message = {**message, "content": parts}
        messages.append(message)
        media.append(found)
    for kind, key in KINDS.items():
        if placed[kind] != len(lists[kind]):
            raise ValueError(f"the messages place {placed[kind]} {key}, and the row has {len(lists[kind])}")
    return messages, media


def part_kind(part: Any) -> str | None:
    """image, video or audio; None for a part that is text."""
    name = str(part.get("type", "")).removeprefix("input_").removesuffix("_url") if isinstance(part, dict) else ""
    return name if name in KINDS else None


def _own(part: Row, kind: str) -> Any:
    for key in (kind, f"{kind}_url", f"input_{kind}", *OWN):
        value = part.get(key)
        if isinstance(value, dict) and key != "bytes":
            inner = next((value[name] for name in OWN if value.get(name)), None)
            value = inner if key != kind or inner is not None else value
            key = next((name for name in OWN if part[key].get(name)), key)
        if value is not None:
            encoded = key in ("base64", "data") and isinstance(value, str) and not value.startswith("data:")
            return f"data:{kind}/*;base64,{value}" if encoded else value
    return None


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def frozen(reference: Any, kind: str) -> Any:
    """A reference of plain values: a text, `{"bytes": ...}`, or a list of pictures for a video. Raises ValueError."""
    if isinstance(reference, os.PathLike):
        return os.fspath(reference)
    if isinstance(reference, str):
        return reference
    if isinstance(reference, (bytes, bytearray, memoryview)):
        return {"bytes": bytes(reference)}
    if isinstance(reference, dict):
        if reference.get("bytes") is not None:
            return {"bytes": bytes(reference["bytes"])}
        if reference.get("array") is not None and kind == "audio":
            return {"bytes": _wave(reference["array"], reference.get("sampling_rate"))}
        inner = next((reference[key] for key in ("path", "url") if reference.get(key)), None)
        if inner is not None:
            return frozen(inner, kind)
        if "ref" in reference or "video" in reference:
            return reference
    if hasattr(reference, "save") and hasattr(reference, "mode"):
        return {"bytes": _png(reference)}
    if (kind == "video" and isinstance(reference, (list, tuple))) or getattr(reference, "ndim", 0) == 4:
        return [frozen(frame, "image") for frame in reference]
    if getattr(reference, "ndim", 0) in (2, 3) and kind == "image":
        from PIL import Image

        return {"bytes": _png(Image.fromarray(reference))}
    raise ValueError(f"a reference to {_a(kind)} is a path, a data URI, bytes or a picture, not {type(reference).__name__}")


def _png(picture: Any) -> bytes:
    from PIL import ImageOps

    target = io.BytesIO()
    turned = ImageOps.exif_transpose(picture)
    (turned if turned.mode in ("RGB", "RGBA", "L", "LA", "P", "1") else turned.convert("RGB")).save(target, "PNG")
    return target.getvalue()


def _wave(array: Any, rate: Any) -> bytes:
    import numpy as np
    import soundfile

    if not rate:
        raise ValueError("a sound given as an array needs its sampling_rate")
    target = io.BytesIO()
    soundfile.write(target, np.asarray(array, np.float32), int(rate), format="WAV", subtype="FLOAT")
    return target.getvalue()


def name_of(reference: Any) -> str:
    """How a message names a reference."""
    if isinstance(reference, dict) and "ref" in reference:
        return name_of(reference["ref"])
    if isinstance(reference, dict) and "video" in reference:
        return f"frame {reference['frame']} of {name_of(reference['video'])}"
    if isinstance(reference, str):
        return f"a data URI of {len(reference)} characters" if reference.startswith("data:") else reference
    if isinstance(reference, dict) and "bytes" in reference:
        return f"{len(reference['bytes'])} bytes that the row holds"
    return f"a list of {len(reference)} frames" if isinstance(reference, list) else type(reference).__name__


def content_of(reference: Any, options: MediaOptions) -> Path | io.BytesIO:
    """Where a decoder reads. Raises ValueError or OSError."""
    if isinstance(reference, dict):
        return io.BytesIO(reference["bytes"])
    if reference.startswith("data:"):
        head, comma, body = reference.partition(",")
        if not comma:
            raise ValueError("the data URI has no comma")
        try:
            return io.BytesIO(base64.b64decode(body, validate=True) if ";base64" in head else unquote_to_bytes(body))
        except binascii.Error as err:
            raise ValueError(f"the data URI is not base64: {err}") from None
    scheme = urlsplit(reference).scheme.lower() if "://" in reference else ""
    if scheme == "file":
        return Path(unquote(urlsplit(reference).path))
    if scheme in ("http", "https"):
        if not options.allow_urls:
            raise ValueError("it is on the web, and nothing is fetched unless template.media.allow_urls=true")
        return _fetched(reference)
    if scheme:
        raise ValueError(f"{scheme}:// cannot be read; download it first")
    return Path(reference).expanduser()


def _fetched(address: str) -> Path:
    """A file from the web, in the cache: fetched once."""
    folder = cache_folder() / "media"
    target = folder / hashlib.sha256(address.encode()).hexdigest()
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        pending = target.with_suffix(f".{os.getpid()}")
        with urllib.request.urlopen(address, timeout=30) as answer:
            pending.write_bytes(answer.read())
        pending.replace(target)
    return target


# --- decoding ---------------------------------------------------------------------------------------------------------


def decode(placed: Placed, rate: int, options: MediaOptions) -> Decoded:
    """All media of a text. rate: samples a second of its sounds. Raises MediaError naming what cannot be read."""
    found, films = Decoded(), dict[str, Any]()
    for kind, reference in placed:
        try:
            scale, inner = (reference["scale"], reference["ref"]) if _scaled(reference) else (1.0, reference)
            if kind == "image":
                found.images.append(_fit(_picture(inner, options, films), options, scale))
            elif kind == "audio":
                found.audios.append(sound(inner, rate, options, scale))
            else:
                frames, metadata = film(inner, options)
                found.videos.append(_stack([_fit(frame, options, scale) for frame in frames]))
                found.metadata.append(metadata)
        except Exception as err:  # decoders raise whatever a broken file leads them to
            reason = f"{kind} {name_of(reference)} cannot be read: {_reason(err)}"
            raise MediaError(reason, options.on_error == "skip") from err
    return found


def _reason(err: Exception) -> str:
    if isinstance(err, FileNotFoundError):
        return "no such file"
    if isinstance(err, IsADirectoryError):
        return "it is a folder"
    if type(err).__name__ == "UnidentifiedImageError":
        return "pillow cannot identify it as a picture: it is damaged, or of another form"
    if isinstance(err, ModuleNotFoundError):
        package = {"PIL": "pillow"}.get(str(err.name).split(".")[0], err.name)
        return f"{package} is missing. Get it: pip install {package}"
    text = " ".join(str(err).split())
    return text if isinstance(err, ValueError) and text else f"{type(err).__name__}: {text}"


def _scaled(reference: Any) -> bool:
    return isinstance(reference, dict) and "ref" in reference


def _picture(reference: Any, options: MediaOptions, films: dict[str, Any]) -> Any:
    if isinstance(reference, dict) and "video" in reference:
        key = name_of(reference["video"])
        if not isinstance(reference["video"], str) or key not in films:
            films[key] = film(reference["video"], options)[0]
        return films[key][reference["frame"]]
    return picture(reference, options)


def picture(reference: Any, options: MediaOptions) -> Any:
    """A PIL picture, upright, in RGB."""
    from PIL import Image, ImageOps

    with Image.open(content_of(reference, options)) as opened:
        opened.load()
        return ImageOps.exif_transpose(opened).convert("RGB")


def _fit(image: Any, options: MediaOptions, scale: float) -> Any:
    """The picture with its area within the limits, sides in proportion."""
    from PIL import Image

    area = image.width * image.height
    wanted = area * scale
    wanted = max(min(wanted, options.max_pixels or wanted), (options.min_pixels or 0) if scale == 1.0 else 0)
    if wanted == area:
        return image
    factor = math.sqrt(wanted / area)
    down = math.floor if wanted < area else math.ceil
    size = (max(1, down(image.width * factor)), max(1, down(image.height * factor)))
    return image.resize(size, Image.Resampling.BICUBIC)


def sound(reference: Any, rate: int, options: MediaOptions, scale: float = 1.0) -> Any:
    """One channel of float32 samples, `rate` a second."""
    import numpy as np
    import soundfile

    samples, own = soundfile.read(content_of(reference, options), dtype="float32", always_2d=True)
    if not len(samples):
        raise ValueError("it holds no sound")
    mono = samples.mean(axis=1)
    if own != rate:
        from scipy.signal import resample_poly

        common = math.gcd(own, rate)
        mono = resample_poly(mono, rate // common, own // common)
    seconds = min(len(mono) / rate * scale, options.max_seconds or math.inf)
    return np.ascontiguousarray(mono[: max(1, round(seconds * rate))], dtype=np.float32)


def film(reference: Any, options: MediaOptions) -> tuple[list[Any], dict[str, Any]]:
    """Frames of a video as pictures, `fps` of each second and `max_frames` at most, and which ones they are."""
    if isinstance(reference, list):
        places = spread(len(reference), len(reference), options.max_frames)
        frames = [picture(reference[n], options) for n in places]
        if not frames:
            raise ValueError("it holds no frame")
        return frames, _metadata(frames, places, len(reference), options.fps)
    import av

    content = content_of(reference, options)
    with av.open(content if isinstance(content, io.BytesIO) else str(content)) as container:
        stream = container.streams.video[0]
        rate = float(stream.average_rate or stream.guessed_rate or 0) or 24.0
        total = sum(1 for _ in container.decode(stream))  # what a header says of it is not always so
    if not total:
        raise ValueError("it holds no frame")
    places = spread(total, max(1, round(total / rate * options.fps)), options.max_frames)
    wanted, content = set(places), content_of(reference, options)
    with av.open(content if isinstance(content, io.BytesIO) else str(content)) as container:
        decoded = enumerate(container.decode(container.streams.video[0]))
        by_place = {n: frame.to_image() for n, frame in decoded if n in wanted}
    frames = [by_place[n] for n in places]
    return frames, _metadata(frames, places, total, rate)


def spread(total: int, wanted: int, limit: int) -> list[int]:
    """Places of at most `limit` frames, evenly over `total`; the first and the last are among them if there are several."""
    count = max(1, min(total, wanted, limit))
    return [round(n * (total - 1) / (count - 1)) for n in range(count)] if count > 1 else [0]


def _metadata(frames: Sequence[Any], places: list[int], total: int, rate: float) -> dict[str, Any]:
    width, height = frames[0].size
    return {
        "total_num_frames": total, "fps": rate, "frames_indices": places, "duration": total / rate,
        "width": width, "height": height, "video_backend": "pyav",
    }  # fmt: skip


def _stack(frames: Sequence[Any]) -> Any:
    import numpy as np

    return np.stack([np.asarray(frame) for frame in frames])


def _a(kind: str) -> str:
    return f"{'a' if kind == 'video' else 'an'} {kind}"
