"""Guesses of the next tokens, which one pass of the model checks: from n-grams of the talk itself, or from a smaller model.

A guess changes when a token is computed, never what it is: greedy answers are those of the model alone, and samples follow its
distribution (Leviathan et al., arXiv 2211.17192). A guess without `shares` is simply compared with the model's own choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from swift_core.config import Component, RunConfig
from swift_core.errors import CapabilityError, RequestError
from swift_core.session import Session

from swift_plugin_torch.config import TransformersEngineConfig
from swift_plugin_torch.rows import Guess, Row
from swift_plugin_torch.sampling import distribution, drawn
from swift_plugin_torch.slots import Slots, joinable

PASS = {"cpu": 32, "cuda": 256}  # tokens of a pass beyond which more of them cost as much as they save
FEW = 8  # tokens that a draft reads beside the other rows; more are read before


class Guesser(Protocol):
    def guess(self, rows: Mapping[int, Row], counts: Mapping[int, int]) -> dict[int, list[Guess]]:
        """For each slot as many guesses as `counts` says, or fewer, of what follows its row's tokens."""

    def leave(self, slot: int) -> None: ...

    def move(self, slot: int, to: int) -> None: ...

    def free(self) -> None: ...


class NGrams:
    """What followed the last tokens where they stood before, in the prompt or the answer: the longest n-gram decides."""

    def __init__(self, most: int) -> None:
        self.sizes = range(most, min(most, 2) - 1, -1)

    def guess(self, rows: Mapping[int, Row], counts: Mapping[int, int]) -> dict[int, list[Guess]]:
        return {slot: [Guess(token) for token in self.follow(row, counts[slot])] for slot, row in rows.items() if counts[slot]}

    def follow(self, row: Row, count: int) -> list[int]:
        """At most `count` tokens; what follows the end of the talk is read on from the guesses, as in a repetition."""
        ids, places = [*row.prompt.ids, *row.ids], row.places
        for end in range(row.known, len(ids) - 1):  # the last one has nothing after it yet
            for size in self.sizes:
                if end + 1 >= size:
                    places[tuple(ids[end + 1 - size : end + 1])] = end + 1
        row.known = max(row.known, len(ids) - 1)
        for size in self.sizes:
            begin = places.get(tuple(ids[-size:])) if len(ids) >= size else None
            if begin is not None:
                for n in range(count):
                    ids.append(ids[begin + n])
                return ids[-count:]
        return []

    def leave(self, slot: int) -> None: ...

    def move(self, slot: int, to: int) -> None: ...

    def free(self) -> None: ...


class Draft:
    """A smaller model with slots of its own, the same row in the same slot. It does not know adapters."""

    def __init__(self, model: Any, chunk: int, vocabulary: int) -> None:
        self.model, self.chunk, self.vocabulary = model, chunk, vocabulary
        self.slots = Slots(model)

    def guess(self, rows: Mapping[int, Row], counts: Mapping[int, int]) -> dict[int, list[Guess]]:
        taken = sorted(slot for slot in rows if counts[slot])
        if not taken:
            return {}
        self.slots.room(max(taken) + 1, 1)
        logits = self._read(taken, [[*rows[slot].prompt.ids, *rows[slot].ids] for slot in taken])
        found: dict[int, list[Guess]] = {slot: [] for slot in taken}
        while True:
            for slot, guess in zip(taken, self._proposed(logits, [rows[slot] for slot in taken]), strict=True):
                found[slot].append(guess)
            taken = [slot for slot in taken if len(found[slot]) < counts[slot]]
            if not taken:
                return found
            logits = self.slots.forward(self.model, taken, [[found[slot][-1].token] for slot in taken])[:, -1]

    def _read(self, taken: Sequence[int], talks: Sequence[list[int]]) -> torch.Tensor:
        """Logits [R, V] after talks, whose tokens that were not read before are read now."""
        for slot, ids in zip(taken, talks, strict=True):
            self.slots.used[slot] = min(self.slots.used[slot], len(ids) - 1)  # guesses that came to nothing
            while len(ids) - self.slots.used[slot] > FEW:
                begun = self.slots.used[slot]
                self.slots.forward(self.model, [slot], [ids[begun : min(begun + self.chunk, len(ids) - 1)]])
        new = [ids[self.slots.used[slot] :] for slot, ids in zip(taken, talks, strict=True)]
        return self.slots.forward(self.model, taken, new)[:, -1]

    def _proposed(self, logits: torch.Tensor, rows: Sequence[Row]) -> list[Guess]:
        """The likeliest token for a greedy row, for the others one drawn as the model's own will be."""
        logits = logits[:, : self.vocabulary].float()
        found = [Guess(token) for token in logits.argmax(-1).tolist()]
        sampled = [n for n, row in enumerate(rows) if not row.greedy]
        if sampled:
            own = [rows[n] for n in sampled]
            shares = distribution(logits[sampled], own)
            for n, token, share in zip(sampled, drawn(shares, own), shares, strict=True):
                lacking = self.vocabulary - len(share)
                found[n] = Guess(token, torch.nn.functional.pad(share / share.sum(), (0, lacking)))
        return found

    def leave(self, slot: int) -> None:
        if slot < self.slots.size:
            self.slots.used[slot] = 0

    def move(self, slot: int, to: int) -> None:
        if slot < self.slots.size:
            self.slots.room(to + 1, 1)
            self.slots.move(slot, to)

    def free(self) -> None:
        self.slots.free()


def limits(rows: Mapping[int, Row], most: int, device: str) -> dict[int, int]:
    """How many guesses each row may have in the next pass."""
    room = PASS.get(device, 256) // len(rows) - 1
    return {
        slot: max(0, min(most, room, row.reach or most, row.request.max_tokens - len(row.ids) - 1))
        for slot, row in rows.items()
    }


def checked(row: Row, guessed: int, accepted: int, most: int) -> None:
    """Count what became of a row's guesses; it gets more of them next time where all were right, fewer where none was."""
    row.drafted += guessed
    row.accepted += accepted
    reach = row.reach or most
    if guessed:
        row.reach = min(most, 2 * reach) if accepted == guessed else max(1, reach // 2) if not accepted else reach


def make(config: TransformersEngineConfig, model: Any, tokenizer: Any, shares: bool) -> Guesser | None:
    """What guesses, where the engine's options ask for it; shares: whether the model's rows share a cache.
    Raises CapabilityError for a model whose states cannot be taken back, and RequestError for a draft that does not fit."""
    if not config.ngrams and not config.draft:
        return None
    if not shares:
        option = "draft" if config.draft else "ngrams"
        raise CapabilityError(
            f"engine.{option}: {_named(model)} cannot take back what it read, where a guess was wrong; leave it out"
        )
    if config.ngrams:
        return NGrams(config.ngrams)
    precision = "bf16" if model.dtype == torch.bfloat16 else "fp32"
    options = {"device": str(model.device), "precision": precision}
    with Session(RunConfig(model=Component(config.draft), backend=Component("torch", options=options))) as session:
        ref = session.model_ref
        if ref.adapter is not None:
            raise RequestError(f"engine.draft: {config.draft} is an adapter; give a whole model, a merged one for example")
        bundle = session.bundle(ref)
    theirs: Any = bundle.processor
    own, other = tokenizer.get_vocab(), getattr(theirs, "tokenizer", theirs).get_vocab()
    if own != other:
        differ = sum(own.get(token) != number for token, number in other.items()) + len(own.keys() - other.keys())
        raise RequestError(
            f"engine.draft: {config.draft} has another vocabulary, {differ:,} tokens differ; a draft needs the model's own"
        )
    draft = bundle.model.eval()
    if not joinable(draft):
        raise CapabilityError(
            f"engine.draft: {_named(draft)} cannot take back what it read, where a guess was wrong; choose another"
        )
    return Draft(draft, config.prefill_tokens, model.config.get_text_config(decoder=True).vocab_size)


def _named(model: Any) -> str:
    return type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
