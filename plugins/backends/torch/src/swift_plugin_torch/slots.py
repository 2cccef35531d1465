"""The key-value cache that running rows share: a slot each, into which new tokens are written in place.

A slot holds the states of its row's tokens from its beginning, so that rows of any length join and leave without moving the
others', and tokens are taken back by counting them no more. Masks and position ids tell the model where each row stands.
Shapes: S slots, C places of a slot, K key heads, D values a head; B rows of a forward pass, T tokens of each.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

BLOCK = 64  # places by which slots grow, at least
FULL, SLIDING = "full_attention", "sliding_attention"
States = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of some tokens, for each layer: [K, tokens, D]."""


@dataclass
class Step:
    """Where the tokens of one forward pass go. B rows, T tokens each, the unused ones on the left."""

    slots: slice | torch.Tensor  # whose states are read
    rows: torch.Tensor  # [B, 1] slots written
    places: torch.Tensor  # [B, T] places written
    width: int  # places read


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values: [S, K, C, D]."""

    is_sliding = False

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self.slots = slots

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values = (_zeros(self.slots.size, self.slots.places, like) for like in (key_states, value_states))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [B, K, T, D] where the step says; returns all states of the rows read, [B, K, width, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        step = self.slots.step
        assert self.keys is not None
        assert self.values is not None
        assert step is not None
        self.keys[step.rows, :, step.places] = key_states.transpose(1, 2)
        self.values[step.rows, :, step.places] = value_states.transpose(1, 2)
        return self.keys[step.slots, :, : step.width], self.values[step.slots, :, : step.width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.slots.step.width if self.slots.step else 0), 0

    def get_seq_length(self) -> int:
        return self.slots.step.width if self.slots.step else 0

    def get_max_length(self) -> int:
        return -1

    def resize(self, used: Sequence[int]) -> None:
        """Make room for as many slots and places as `slots` says, keeping the first `used[s]` places of slot s."""
        if self.keys is None or self.values is None:
            return
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = _zeros(self.slots.size, self.slots.places, old)
            for slot, count in enumerate(used):
                new[slot, :, :count] = old[slot, :, :count]
            setattr(self, name, new)


class Slots(Cache):
    """The cache of all layers. The caller says which slots are taken; `used[s]` is how many places of slot s count."""

    def __init__(self, model: Any) -> None:
        config = _config(model)
        self.windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
        super().__init__(layers=[SlotLayer(self) for _ in self.windows])
        self.size = self.places = 0
        self.used: list[int] = []
        self.step: Step | None = None
        self.dtype, self.device = model.dtype, model.device
        self.keeps = "logits_to_keep" in inspect.signature(_base(model).forward).parameters

    def room(self, slots: int, places: int) -> None:
        """Make sure of so many slots of so many places."""
        if slots <= self.size and places <= self.places:
            return
        if slots > self.size:
            self.size = max(slots, min(2 * self.size, slots + 8))
        if places > self.places:
            self.places = -(-max(places, min(self.places * 3 // 2, self.places + 1024)) // BLOCK) * BLOCK
        for layer in self.layers:
            layer.resize(self.used)
        self.used += [0] * (self.size - len(self.used))

    def forward(self, call: Any, slots: Sequence[int], ids: Sequence[Sequence[int]], keep: int = 1) -> torch.Tensor:
        """Logits [B, keep, V] of the last `keep` tokens that rows `slots` get after those they have; `used` grows by them.

        call: `call(**inputs) -> outputs` of the model. A row with no ids is only there so that its neighbours are adjacent.
        """
        width, starts = max(len(own) for own in ids), [self.used[slot] for slot in slots]
        ends = [start + len(own) for start, own in zip(starts, ids, strict=True)]
        self.room(max(slots) + 1, max(ends) + width)
        padding = [width - len(own) for own in ids]
        # Padding stands on the left and is written after the row's end, where nobody reads before it is written over.
        places = [[*range(end, end + pad), *range(start, end)] for start, end, pad in zip(starts, ends, padding, strict=True)]
        positions = torch.tensor(
            [[*[0] * pad, *range(start, end)] for start, end, pad in zip(starts, ends, padding, strict=True)],
            device=self.device,
        )
        rows = torch.tensor(slots, device=self.device)
        adjacent = list(slots) == list(range(slots[0], slots[0] + len(slots)))
        chosen = slice(slots[0], slots[-1] + 1) if adjacent else rows
        self.step = Step(chosen, rows[:, None], torch.tensor(places, device=self.device), max(max(ends), 1))
        inputs = {
            "input_ids": torch.tensor([[*[0] * pad, *own] for pad, own in zip(padding, ids, strict=True)], device=self.device),
            "attention_mask": self._masks(positions, self.step.width), "position_ids": positions, "past_key_values": self,
            "use_cache": True,
        }  # fmt: skip
        logits: torch.Tensor = call(**inputs, **({"logits_to_keep": keep} if self.keeps else {})).logits
        for slot, end in zip(slots, ends, strict=True):
            self.used[slot] = end
        return logits[:, -keep:]

    def _masks(self, positions: torch.Tensor, width: int) -> torch.Tensor | dict[str, torch.Tensor]:
        """What each token sees, for each kind of layer: [B, 1, T, width], 0 or the least number."""
        places = torch.arange(width, device=self.device)
        made = {}
        for kind, window in {(SLIDING if window else FULL, window) for window in self.windows}:
            seen = places <= positions[..., None]
            if window:
                seen &= places > positions[..., None] - window
            mask = torch.zeros(seen.shape, dtype=self.dtype, device=self.device)
            made[kind] = mask.masked_fill_(~seen, torch.finfo(self.dtype).min)[:, None]
        return made if len(made) > 1 else next(iter(made.values()))

    def save(self, slot: int, count: int) -> States:
        """A copy of the first `count` places of a slot."""
        return [(layer.keys[slot, :, :count].clone(), layer.values[slot, :, :count].clone()) for layer in self.layers]

    def load(self, slot: int, states: States, count: int) -> None:
        """Begin a slot with the first `count` tokens of what `save` gave."""
        self.room(slot + 1, count)
        for layer, (keys, values) in zip(self.layers, states, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(keys[None], values[None])
            layer.keys[slot, :, :count] = keys[:, :count]
            layer.values[slot, :, :count] = values[:, :count]
        self.used[slot] = count

    def move(self, slot: int, to: int) -> None:
        """Carry what a slot holds over to another."""
        count = self.used[slot]
        for layer in self.layers:
            for states in (layer.keys, layer.values):
                if states is not None:
                    states[to, :, :count] = states[slot, :, :count]
        self.used[to], self.used[slot] = count, 0

    def clear(self, slot: int) -> None:
        """Empty a slot whose numbers went wrong: what is not finite would reach a later row through its mask."""
        for layer in self.layers:
            if layer.keys is not None:
                layer.keys[slot] = 0
                layer.values[slot] = 0
        self.used[slot] = 0

    def free(self) -> None:
        """Give all memory back."""
        for layer in self.layers:
            layer.keys = layer.values = None
            layer.is_initialized = False
        self.size = self.places = 0
        self.used, self.step = [], None

    def bytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers if layer.keys is not None)


def _zeros(slots: int, places: int, like: torch.Tensor) -> torch.Tensor:
    """[slots, K, places, D]. On a CPU memory is taken only as it is written: a long row makes room, not use, for others."""
    shape = (slots, like.shape[1], places, like.shape[3])
    if like.device.type != "cpu":
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    size = int(np.prod(shape)) * like.element_size()
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(like.dtype).view(shape)


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _config(model: Any) -> Any:
    return _base(model).config.get_text_config(decoder=True)


def joinable(model: Any) -> bool:
    """Whether rows of this model can share such a cache, with the same result as alone: by what it says of itself, then
    tried on a few tokens."""
    base = _base(model)
    config = _config(model)
    accepted = inspect.signature(base.forward).parameters
    if base.config.is_encoder_decoder or getattr(base, "_is_stateful", False) or getattr(config, "alibi", False):
        return False
    if not {"position_ids", "past_key_values", "attention_mask"} <= set(accepted):
        return False
    if getattr(config, "attention_chunk_size", None):
        return False
    try:
        layers = DynamicCache(config=config).layers
        if not layers or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
            return False
        return _same(model, config.vocab_size)
    except Exception:  # an architecture that takes no masks or positions from outside keeps its own way
        return False


def _same(model: Any, vocabulary: int) -> bool:
    """Whether two rows that begin together, after one that began before them, get the logits of a plain forward pass."""
    rows = [[(7 * n + 11 * row + 5) % vocabulary for n in range(length)] for row, length in enumerate((9, 7, 12))]
    slots, gaps, size = Slots(model), [], 0.0
    with torch.inference_mode():
        plain = [model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0].float() for ids in rows]
        size = max(float(logits.abs().max()) for logits in plain)
        slots.room(3, 1)
        slots.forward(model, [0], [rows[0][:6]])
        for slot in (1, 2):
            found = slots.forward(model, [slot], [rows[slot][:2]])
            gaps.append((found[0, -1].float() - plain[slot][1]).abs().max())
        found = slots.forward(model, [1, 2], [rows[1][2:5], rows[2][2:9]])
        gaps += [(found[n, -1].float() - plain[n + 1][end]).abs().max() for n, end in enumerate((4, 8))]
        for _ in range(2):
            at = [slots.used[n] for n in range(3)]
            found = slots.forward(model, [0, 1, 2], [[ids[n]] for ids, n in zip(rows, at, strict=True)])
            gaps += [(found[n, -1].float() - plain[n][at[n]]).abs().max() for n in range(3)]
    least = 1e-4 if model.dtype == torch.float32 else 3e-2
    return bool(torch.stack(gaps).isfinite().all()) and float(torch.stack(gaps).max()) <= least * max(size, 1e-6)
