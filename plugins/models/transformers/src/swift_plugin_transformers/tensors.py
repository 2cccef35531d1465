"""Tensors that a processor makes of single texts, put together to those of a batch.

Three sorts: a value for each token, padded as ids are; a tensor that counts texts first, which gets a row for each text, also
for one without media; and all others, which count media, or patches of them, and follow each other. Other dimensions that
differ are padded with zeros at their ends: masks and sizes beside them say what is real. Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from swift_core.errors import RunError


@dataclass(frozen=True)
class Layout:
    """`rows` names the tensors whose first dimension counts texts; `along`, those whose media follow each other in another
    dimension, with that: their first is always 1."""

    rows: frozenset[str] = frozenset()
    along: Mapping[str, int] = field(default_factory=dict)


Place = tuple[int, int, int]  # of a text in the batch: its row, its first token there, and its tokens


POINTING = {"image_token_pooling": "pixel_values", "video_token_pooling": "pixel_values_videos"}
"""Tensors of indices into all patches of a batch, as Molmo 2's, and the tensor that holds those patches; -1 points nowhere."""


def tensors_of(values: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What can be a tensor. A list of tensors that differ in size becomes a padded one."""
    found = {}
    for key, value in values.items():
        tensor = _tensor(value)
        if tensor is not None:
            found[key] = tensor
    return found


def _tensor(value: Any) -> torch.Tensor | None:
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, (list, tuple)) and value:
        parts = [_tensor(item) for item in value]
        if any(part is None or part.ndim != parts[0].ndim for part in parts):  # type: ignore[union-attr]
            return None
        return torch.cat(padded([part[None] for part in parts]))  # type: ignore[index]
    if isinstance(value, (bool, int, float)):
        return torch.tensor(value)
    if hasattr(value, "__array__") and getattr(getattr(value, "dtype", None), "kind", "O") in "biuf":
        return torch.as_tensor(value)
    return None


def padded(parts: Sequence[torch.Tensor], first: int = 1) -> list[torch.Tensor]:
    """The tensors with zeros at the ends of all dimensions from `first` on, so that these are alike."""
    if len({part.shape[first:] for part in parts}) == 1:
        return list(parts)
    shape = [max(sizes) for sizes in zip(*(part.shape[first:] for part in parts), strict=True)]
    filled = []
    for part in parts:
        whole = part.new_zeros((*part.shape[:first], *shape))
        whole[tuple(slice(size) for size in part.shape)] = part
        filled.append(whole)
    return filled


def join(
    found: Sequence[Mapping[str, torch.Tensor]], places: Sequence[Place], size: tuple[int, int], extras: Sequence[str],
    layout: Layout,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The tensors of a batch of `size` (B, T) from those of its texts. `extras`: values for each token, always given."""
    found = _counted_on(found)
    joined: dict[str, torch.Tensor] = {}
    for key in dict.fromkeys([*extras, *(key for tensors in found for key in tensors)]):
        have = [(tensors[key], place) for tensors, place in zip(found, places, strict=True) if key in tensors]
        if len({part.ndim for part, _ in have}) > 1:
            shapes = ", ".join(str(tuple(part.shape)) for part, _ in have)
            raise RunError(f"media: the processor gives {key} in shapes that make no batch: {shapes}")
        if all(_each_token(part, place) for part, place in have):
            joined[key] = _by_token(have, size)
        elif key in layout.along:
            joined[key] = torch.cat([part for part, _ in have], layout.along[key])
        elif key in layout.rows:
            joined[key] = _by_row(have, size[0])
        else:
            joined[key] = torch.cat(padded([part if part.ndim else part[None] for part, _ in have]))
    return joined


def _counted_on(found: Sequence[Mapping[str, torch.Tensor]]) -> list[Mapping[str, torch.Tensor]]:
    """The tensors of each text, with indices that go on where those of the texts before it end."""
    before = dict.fromkeys(POINTING, 0)
    moved = []
    for tensors in found:
        own = dict(tensors)
        for key, patches in POINTING.items():
            if key in own and patches in own:
                own[key] = torch.where(own[key] >= 0, own[key] + before[key], own[key])
                before[key] += own[patches].numel() // own[patches].shape[-1]
        moved.append(own)
    return moved


def _each_token(part: torch.Tensor, place: Place) -> bool:
    return tuple(part.shape[:2]) == (1, place[2]) and not part.is_floating_point()


def _by_token(have: list[tuple[torch.Tensor, Place]], size: tuple[int, int]) -> torch.Tensor:
    if not have:
        return torch.zeros(size, dtype=torch.long)
    parts = padded([part for part, _ in have], 2)
    whole = parts[0].new_zeros((*size, *parts[0].shape[2:]))
    for part, (_, (row, start, length)) in zip(parts, have, strict=True):
        whole[row, start : start + length] = part[0]
    return whole


def _by_row(have: list[tuple[torch.Tensor, Place]], count: int) -> torch.Tensor:
    """One row for each text of the batch, zeros where it has no media; texts packed into a row follow each other there."""
    rows: dict[int, list[torch.Tensor]] = {}
    for part, (row, _, _) in have:
        rows.setdefault(row, []).append(part)
    whole = {row: torch.cat(padded(parts, 2), 1) for row, parts in rows.items()}
    filled = padded(list(whole.values()))
    empty = torch.zeros_like(filled[0])
    by_row = dict(zip(whole, filled, strict=True))
    return torch.cat([by_row.get(row, empty) for row in range(count)])
