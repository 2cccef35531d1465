"""What the scheduler's thread does with the model: reads prompts, makes tokens, keeps states for later prompts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from swift_core.errors import RunError

from swift_plugin_torch import grouped, speculate
from swift_plugin_torch.adapters import Adapters
from swift_plugin_torch.config import TransformersEngineConfig
from swift_plugin_torch.prefixes import Prefixes
from swift_plugin_torch.prompts import gathered, kinds, placed
from swift_plugin_torch.rows import Guess, Row
from swift_plugin_torch.sampling import Processor, choose
from swift_plugin_torch.slots import Slots, joinable

KEEP = 256 << 20  # bytes of slots that stay when nothing runs


class Runner:
    """The model with its cache. Every method is called by one thread at a time."""

    def __init__(
        self, adapters: Adapters, template: Any, pad: int, config: TransformersEngineConfig, processors: Sequence[Processor],
        tokenizer: Any = None,
    ) -> None:  # fmt: skip
        self.adapters, self.template, self.pad, self.config, self.processors = adapters, template, pad, config, processors
        with adapters.turned(None) as model:  # an adapter that was loaded already decides nothing about the others
            self.slots = Slots(model) if joinable(model) else None
        self.guesser = speculate.make(config, adapters.model, tokenizer, self.slots is not None)
        self.prefixes = Prefixes(config.prefix_mib << 20)
        self.version = 0
        self._turn = 0
        self._told = False  # that rows are answered without guesses

    def joins(self, row: Row) -> bool:
        """Whether a row can share the cache. One with inputs of its own, media for example, cannot."""
        return self.slots is not None and row.prompt.inputs is None and self.adapters.joinable(row.adapter)

    # --- rows in slots ------------------------------------------------------------------------------------------------

    def begin(self, row: Row, slot: int) -> None:
        """Start a row: with the states of a prompt that begins alike, or with all that its first row computed."""
        self.adapters.loaded(row.adapter)
        slots, prompt = self._slots(), row.prompt
        slots.room(slot + 1, 1)
        slots.used[slot] = 0
        if prompt.logits is not None:
            slots.load(slot, prompt.states, len(prompt.ids))
            logits, prompt.waiting = prompt.logits, prompt.waiting - 1
            if not prompt.waiting:
                prompt.states = prompt.logits = None
            self._advance(logits, [row], [slot])
            return
        states, count = self.prefixes.find(row.adapter, prompt.ids)
        if states is not None:
            slots.load(slot, states, count)
        prompt.cached = count

    def read(self, rows: dict[int, Row]) -> None:
        """Read the next part of some prompts, at most `prefill_tokens` with their padding, in one pass."""
        slots, budget = self._slots(), self.config.prefill_tokens
        left = {slot: len(row.prompt.ids) - slots.used[slot] for slot, row in rows.items()}
        self._turn += 1
        order = sorted(rows, key=lambda slot: left[slot])
        if self._turn % 2:  # every other time the oldest first, so that short prompts do not keep a long one waiting
            oldest = next(iter(rows))
            order = [oldest, *(slot for slot in order if slot != oldest)]
        first, chosen = min(left[order[0]], budget), [order[0]]
        longest = first
        for slot in order[1:]:
            width = max(longest, left[slot])
            if (len(chosen) + 1) * width <= budget and left[slot] <= 2 * first + 16 and first <= 2 * left[slot] + 16:
                chosen.append(slot)
                longest = width
        (group, *_) = self.adapters.groups([rows[slot].adapter for slot in chosen])
        chosen = sorted(chosen[n] for n in group)
        parts = [rows[slot].prompt.ids[slots.used[slot] : slots.used[slot] + min(left[slot], budget)] for slot in chosen]
        logits = self._forward(chosen, parts, [rows[slot].adapter for slot in chosen])[:, -1]
        over = [n for n, slot in enumerate(chosen) if slots.used[slot] == len(rows[slot].prompt.ids)]
        for n in over:
            self._prompt_read(rows[chosen[n]], chosen[n], logits[n : n + 1])
        if over:
            self._advance(logits[over], [rows[chosen[n]] for n in over], [chosen[n] for n in over])

    def _prompt_read(self, row: Row, slot: int, logits: torch.Tensor) -> None:
        """Keep what other rows can use."""
        slots, prompt = self._slots(), row.prompt
        states = None
        if prompt.waiting:
            prompt.states = states = slots.save(slot, len(prompt.ids))
            prompt.logits = logits.clone()
        if self.prefixes.lacks(row.adapter, prompt.ids):
            self.prefixes.keep(row.adapter, prompt.ids, states or slots.save(slot, len(prompt.ids)))

    def decode(self, rows: dict[int, Row]) -> None:
        """One token for each row, and those that were guessed right after it."""
        taken, guesses = sorted(rows), self._guesses(rows)
        for group in self.adapters.groups([rows[slot].adapter for slot in taken]):
            own = [taken[n] for n in group]
            span = range(own[0], own[-1] + 1)
            # Slots between them come along for nothing, as rows side by side are read without a copy.
            within = list(span) if len(span) <= len(own) + max(2, len(own) // 2) else own
            ids = [
                [*rows[slot].ids[-1:], *(guess.token for guess in guesses.get(slot, ()))]
                if slot in rows and slot in own
                else []
                for slot in within
            ]
            names = [rows[slot].adapter if slot in own else rows[own[0]].adapter for slot in within]
            keep = max(map(len, ids))
            logits = self._forward(within, ids, names, keep)
            if within != own:
                logits = logits[[within.index(slot) for slot in own]]
            if keep == 1:
                self._advance(logits[:, -1], [rows[slot] for slot in own], own)
            else:
                self._check(logits, [rows[slot] for slot in own], own, [guesses.get(slot, []) for slot in own])

    def _guesses(self, rows: dict[int, Row]) -> dict[int, list[Guess]]:
        if self.guesser is None:
            return {}
        counts = speculate.limits(rows, self.config.guesses, self.adapters.model.device.type)
        return self.guesser.guess(rows, counts) if any(counts.values()) else {}

    def _check(self, logits: torch.Tensor, rows: Sequence[Row], taken: Sequence[int], guesses: Sequence[list[Guess]]) -> None:
        """Choose tokens one by one as long as they are what was guessed. logits: [R, T, V], of each row's last token and its
        guesses, on the right."""
        begun = [len(row.ids) for row in rows]
        last: list[int | None] = [None] * len(rows)
        alive, place = list(range(len(rows))), 0
        while alive:
            for n in alive:
                rows[n].guess = guesses[n][place] if place < len(guesses[n]) else None
            here = torch.stack([logits[n, place - len(guesses[n]) - 1] for n in alive])
            for n, token in zip(alive, choose(here, [rows[n] for n in alive], self.processors), strict=True):
                last[n] = token
            alive = [
                n for n in alive
                if rows[n].guess is not None and rows[n].guess.token == last[n]  # type: ignore[union-attr]
                and rows[n].finish is None and not rows[n].call.cancelled
            ]  # fmt: skip
            place += 1
        for n, (row, slot) in enumerate(zip(rows, taken, strict=True)):
            row.guess = None
            made = row.ids[begun[n] :]
            right = sum(token == guess.token for token, guess in zip(made, guesses[n], strict=False))
            speculate.checked(row, len(guesses[n]), right, self.config.guesses)
            self._slots().used[slot] = len(row.prompt.ids) + len(row.ids) - 1  # what was guessed wrong counts no more
        self._tell(rows, last, taken)

    def _forward(
        self, taken: Sequence[int], ids: Sequence[Sequence[int]], names: Sequence[str | None], keep: int = 1
    ) -> torch.Tensor:
        return self._slots().forward(self.adapters.passes(names), taken, ids, keep)

    def _advance(self, logits: torch.Tensor, rows: Sequence[Row], taken: Sequence[int] = ()) -> list[int | None]:
        """Choose a token for each row, and send what is new."""
        tokens = choose(logits, rows, self.processors)
        self._tell(rows, tokens, taken)
        return tokens

    def _tell(self, rows: Sequence[Row], tokens: Sequence[int | None], taken: Sequence[int]) -> None:
        """Send what is new of each row, whose last token is in `tokens`."""
        for n, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            if row.call.cancelled:
                continue
            if token is None and row.finish is None:
                row.call.fail(RunError("the model gave logits that are not finite numbers"))
                if taken:
                    self._slots().clear(taken[n])
            elif row.finish is not None:
                row.end(self.template.decode, self.version)
            elif row.call.stream:
                row.send_piece()

    def leave(self, row: Row, slot: int) -> None:
        """Free a slot. States of a whole talk are kept for its next turn."""
        slots = self._slots()
        if row.finish is not None and row.leads and not row.call.cancelled:
            ids = [*row.prompt.ids, *row.ids][: slots.used[slot]]
            if self.prefixes.lacks(row.adapter, ids):
                self.prefixes.keep(row.adapter, ids, slots.save(slot, len(ids)))
        slots.used[slot] = 0
        if self.guesser is not None:
            self.guesser.leave(slot)

    def move(self, slot: int, to: int) -> None:
        self._slots().move(slot, to)
        if self.guesser is not None:
            self.guesser.move(slot, to)

    def _slots(self) -> Slots:
        assert self.slots is not None
        return self.slots

    # --- rows that go alone -------------------------------------------------------------------------------------------

    def alike(self, one: Row, other: Row) -> bool:
        """Whether two rows can be generated together from beginning to end."""
        same = one.adapter == other.adapter and kinds(one.request) == kinds(other.request)
        if same and "decoder_input_ids" in (one.prompt.inputs or {}):  # its prompts are not padded
            same = len(one.prompt.ids) == len(other.prompt.ids)
        return same and not self.joins(other)

    def together(self, rows: Sequence[Row]) -> None:
        """Generate rows that cannot share the cache, to their ends."""
        self.adapters.loaded(rows[0].adapter)
        if self.guesser is not None and not self._told:
            self._told = True
            warnings.warn(
                "answers to prompts with media, or with a prompt-tuning adapter, are made without guesses", stacklevel=2
            )
        inputs = placed(
            gathered(
                self.template, [row.prompt.inputs for row in rows], [row.prompt.ids for row in rows], self.pad,
                bool(getattr(self.adapters.model.config, "is_encoder_decoder", False)),
            ),
            self.adapters.model.device, self.adapters.model.dtype,
        )  # fmt: skip
        if "decoder_input_ids" not in inputs:
            for row, count in zip(rows, inputs["attention_mask"].sum(1).tolist(), strict=True):
                row.prompt.tokens = count

        def step(logits: torch.Tensor) -> list[int | None]:
            alive = [n for n, row in enumerate(rows) if row.finish is None and not row.call.cancelled]
            tokens: list[int | None] = [None] * len(rows)
            if alive:
                found = self._advance(logits[alive], [rows[n] for n in alive])
                for n, token in zip(alive, found, strict=True):
                    tokens[n] = token
            return tokens

        with self.adapters.turned(rows[0].adapter) as model:
            grouped.generate(model, rows, inputs, self.pad, step)

    # --- the rest -----------------------------------------------------------------------------------------------------

    def forget(self) -> None:
        """Other weights: nothing that was computed counts."""
        self.prefixes.clear()

    def reset(self) -> None:
        """After a failure: nothing of what ran is used again."""
        if self.slots is not None:
            self.slots.free()
        if self.guesser is not None:
            self.guesser.free()

    def rest(self) -> None:
        """Nothing runs: leave the model as others expect it, and give large memory back."""
        self.adapters.rest()
        if self.slots is not None and self.slots.bytes() > KEEP:
            self.slots.free()
