"""Boxes, points and names of things in pictures, written as each family writes them.

A row has `objects: {"ref": [...], "bbox": [[x1, y1, x2, y2] or [x, y], ...], "bbox_type", "image_id"}`, and its texts
have `<ref-object>` and `<bbox>` tags, one for each in order. How a family writes a box is data: `[models.grounding]` of its
manifest. Pure functions: sizes of pictures are asked for, and only where they are needed.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from swift_core.types import Row

from swift_plugin_transformers.media import decode, frozen

TAG = re.compile(r"<(bbox|ref-object)>")
TYPES = ("real", "norm1", "norm1000")  # of the coordinates in a row: pixels of the file's picture, 0 to 1, 0 to 1000
SLACK = 0.01  # how far beyond its picture's edge a box may reach, as a share of the side: rounding in the data
Size = tuple[int, int]  # width and height, in pixels
SizeOf = Callable[[int], Size]
FIELDS = {"box": ("x1", "y1", "x2", "y2"), "point": ("x", "y"), "ref": ("ref",)}


@dataclass(frozen=True)
class Convention:
    """`[models.grounding]`: how a family writes what it points at. Raises ValueError for a form with unknown fields.

    scale: what coordinates count. `norm1000` (any number: `norm1024`) thousandths of a side, `real` pixels of the picture as it
    is in its file, `resized` pixels of what the processor makes of it.
    """

    box: str = "[{x1}, {y1}, {x2}, {y2}]"
    point: str = "[{x}, {y}]"
    ref: str = "{ref}"
    scale: str = "norm1000"
    largest: int | None = None  # the highest coordinate that can be written, where it is below the scale's end
    decimals: int = 0

    def __post_init__(self) -> None:
        if self.scale not in ("real", "resized") and not re.fullmatch(r"norm[1-9]\d*", self.scale):
            raise ValueError(f"grounding.scale: expected real, resized or norm1000 (any number), not {self.scale!r}")
        for name, known in FIELDS.items():
            form = getattr(self, name)
            try:
                used = {field for _, field, _, _ in string.Formatter().parse(form) if field is not None}
                form.format(**dict.fromkeys(known, "r" if name == "ref" else 1.0 if self.decimals else 1))
            except (ValueError, KeyError, IndexError) as err:
                raise ValueError(f"grounding.{name}: {form!r} cannot be written: {err}. Fields: {', '.join(known)}") from None
            if used != set(known):
                raise ValueError(f"grounding.{name}: {form!r} must have the fields {', '.join(known)}")

    @property
    def steps(self) -> int | None:
        """Into how many steps a side is divided; None where pixels are counted."""
        return int(self.scale[4:]) if self.scale.startswith("norm") else None


def ground(messages: Sequence[Row], objects: Any, convention: Convention, size_of: SizeOf, resized_of: SizeOf) -> list[Row]:
    """The messages with their `<ref-object>` and `<bbox>` tags replaced.

    size_of, resized_of: width and height of the row's picture number n, in its file and out of the processor; asked for only
    where pixels are to be converted. Without objects, or without tags, the messages are as they were.
    Raises ValueError where tags and objects differ in number, or where a box is none.
    """
    texts = [text for message in messages for text in _texts(message)]
    tags = [match[1] for text in texts for match in TAG.finditer(text)]
    if not isinstance(objects, dict) or not tags or not ({"ref", "bbox"} & objects.keys()):
        return list(messages)
    refs, boxes = _list(objects, "ref"), _list(objects, "bbox")
    for name, key, found in (("ref-object", "ref", refs), ("bbox", "bbox", boxes)):
        if tags.count(name) != len(found):
            raise ValueError(f"the messages have {tags.count(name)} <{name}> tags, and objects.{key} has {len(found)}")
    for number, ref in enumerate(refs):
        if not isinstance(ref, str):
            raise ValueError(f"objects.ref[{number}] must be text, not {type(ref).__name__}")
    named = iter([convention.ref.format(ref=ref) for ref in refs])
    written = iter([_written(objects, n, box, convention, size_of, resized_of) for n, box in enumerate(boxes)])
    waiting = {"ref-object": named, "bbox": written}
    return [_replaced(message, waiting) for message in messages]


def ground_row(row: Row, convention: Convention, media: Any) -> Row:
    """The row with its tags replaced, its objects used up. `media` is the template's `Multimodal`, None for a text model."""
    pictures: dict[int, Any] = {}

    def open_picture(number: int) -> Any:
        held = row.get("images") or []
        if media is None or number >= len(held):
            count = len(held) if media else 0
            raise ValueError(f"objects.image_id names picture {number}, and the row shows {count} to this model")
        if number not in pictures:
            pictures[number] = decode([("image", frozen(held[number], "image"))], media.rate, media.options).images[0]
        return pictures[number]

    def size_of(number: int) -> Size:
        return tuple(open_picture(number).size)  # type: ignore[return-value]

    def resized_of(number: int) -> Size:
        return resized(media.processor, open_picture(number))

    messages = ground(row["messages"], row["objects"], convention, size_of, resized_of)
    return {**{key: value for key, value in row.items() if key != "objects"}, "messages": messages}


def _list(objects: Row, key: str) -> list[Any]:
    value = objects.get(key)
    if value is None:
        return []
    if key == "bbox" and isinstance(value, list) and value and all(isinstance(part, (int, float)) for part in value):
        return [value]  # one box alone
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"objects.{key} must be a list, not {type(value).__name__}")
    return list(value)


def _written(objects: Row, number: int, box: Any, convention: Convention, size_of: SizeOf, resized_of: SizeOf) -> str:
    shares = list(_shares(objects, number, box, size_of))
    if convention.steps is not None:
        sides: Sequence[float] = [convention.steps] * 2
    else:
        sides = (resized_of if convention.scale == "resized" else size_of)(_image(objects, number))
    values = [_rounded(share * sides[n % 2], sides[n % 2], convention) for n, share in enumerate(shares)]
    if len(values) == 2:
        return convention.point.format(x=values[0], y=values[1])
    return convention.box.format(x1=values[0], y1=values[1], x2=values[2], y2=values[3])


def _shares(objects: Row, number: int, box: Any, size_of: SizeOf) -> Iterator[float]:
    """The coordinates of a box as shares of its picture's sides, 0 to 1."""
    where, kind = f"objects.bbox[{number}]", objects.get("bbox_type") or "real"
    if kind not in TYPES:
        raise ValueError(f"objects.bbox_type: expected {', '.join(TYPES)}, not {kind!r}")
    if not isinstance(box, (list, tuple)) or len(box) not in (2, 4):
        raise ValueError(f"{where} must be [x1, y1, x2, y2] or [x, y]")
    if not all(isinstance(part, (int, float)) and not isinstance(part, bool) and math.isfinite(part) for part in box):
        raise ValueError(f"{where} must hold numbers")
    if len(box) == 4 and (box[0] > box[2] or box[1] > box[3]):
        raise ValueError(f"{where} is {list(box)}: x1 and y1 must not be above x2 and y2")
    ends: Sequence[float] = {"norm1": (1, 1), "norm1000": (1000, 1000)}.get(kind) or size_of(_image(objects, number))
    for n, part in enumerate(box):
        share = part / ends[n % 2]
        if not -SLACK <= share <= 1 + SLACK:
            raise ValueError(f"{where} is {list(box)}, outside of its picture, which ends at {list(ends)} (bbox_type {kind})")
        yield min(max(share, 0.0), 1.0)


def _image(objects: Row, number: int) -> int:
    """The picture that a box is in; the first where the row does not say."""
    ids = objects.get("image_id")
    if ids is None:
        return 0
    found = ids[number] if isinstance(ids, (list, tuple)) and number < len(ids) else ids
    if not isinstance(found, int) or isinstance(found, bool) or found < 0:
        raise ValueError(f"objects.image_id must have the number of a picture, from 0, for bbox[{number}]")
    return found


def _rounded(value: float, side: float, convention: Convention) -> float | int:
    limit = side if convention.largest is None else convention.largest
    value = min(value, limit)
    return round(value, convention.decimals) if convention.decimals else math.floor(value + 0.5)


def _texts(message: Row) -> list[str]:
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content if part.get("type") == "text"] if isinstance(content, list) else []


def _replaced(message: Row, waiting: dict[str, Iterator[str]]) -> Row:
    def put(text: str) -> str:
        return TAG.sub(lambda match: next(waiting[match[1]]), text)

    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": put(content)}
    if isinstance(content, list):
        parts = [{**part, "text": put(part["text"])} if part.get("type") == "text" else part for part in content]
        return {**message, "content": parts}
    return message


def resized(processor: Any, picture: Any) -> Size:
    """Width and height of what a checkpoint's processor makes of a picture: its patches' grid, or the size of its pixels.

    Raises ValueError where its output tells neither.
    """
    made = getattr(processor, "image_processor", processor)(images=[picture])
    grid = made.get("image_grid_thw")
    if grid is not None:
        _, high, wide = (int(side) for side in grid[0])
        patch = int(getattr(processor, "image_processor", processor).patch_size)
        return wide * patch, high * patch
    shape = getattr(made.get("pixel_values"), "shape", None)
    if shape is None:
        shape = getattr(made["pixel_values"][0], "shape", ())
    if len(shape) < 2:
        raise ValueError("the processor does not tell the size that it gives pictures; grounding.scale=resized cannot be used")
    return int(shape[-1]), int(shape[-2])
