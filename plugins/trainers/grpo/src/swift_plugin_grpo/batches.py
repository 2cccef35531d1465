"""Groups of rollouts as batches: the answers to a prompt together, so that the prompt is computed once where the model allows.

Values of a rollout's own tokens stand in the batch's order of trained positions, one rollout after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from swift_core.types import Batch, Sample, Template
from swift_plugin_supervised.groups import group_batches, owners

from swift_plugin_grpo.losses import Tokens
from swift_plugin_grpo.scoring import Group, Scored

MOST = 16384  # tokens of a pass where the backend names no number


class Batcher:
    """How a run lays out its answers. flat: end to end, isolated from each other; shares: the prompt of a group once."""

    def __init__(self, template: Template, flat: bool, shares: bool, limit: int | None) -> None:
        self.template, self.flat, self.shares, self.limit = template, flat, shares, limit or MOST

    def of(self, groups: Sequence[Sequence[Scored]]) -> Iterator[tuple[Batch, list[Scored]]]:
        """Batches with the answers in each, in the order of their tokens. Answers without a token are left out."""
        filled = [[answer for answer in group if answer.rollout.length] for group in groups]
        for part in self._parts([group for group in filled if group]):
            samples = [[answer.rollout.sample() for answer in group] for group in part]
            ((batch, _),) = group_batches(self.template, samples, self.flat, self.shares, None)
            yield batch, [answer for group in part for answer in group]

    def samples(self, samples: Sequence[Sample]) -> Iterator[Batch]:
        """Batches of samples that do not belong together."""
        for batch, _ in group_batches(self.template, [[sample] for sample in samples], self.flat, False, self.limit):
            yield batch

    def _parts(self, groups: Sequence[list[Scored]]) -> Iterator[list[list[Scored]]]:
        """Groups in parts of at most `limit` tokens; one that is larger is divided."""
        part: list[list[Scored]] = []
        for group in groups:
            for piece in self._pieces(group):
                if part and self._size([*part, piece]) > self.limit:
                    yield part
                    part = []
                part.append(piece)
        if part:
            yield part

    def _pieces(self, group: list[Scored]) -> Iterator[list[Scored]]:
        piece: list[Scored] = []
        for answer in group:
            if piece and self._size([[*piece, answer]]) > self.limit:
                yield piece
                piece = []
            piece.append(answer)
        if piece:
            yield piece

    def _size(self, groups: Sequence[Sequence[Scored]]) -> int:
        """Tokens that a pass computes."""
        lengths = [[len(answer.rollout.ids) for answer in group] for group in groups]
        if not self.flat:
            return max(max(group) for group in lengths) * sum(map(len, lengths))
        sharing = [group for group in groups if not group[0].rollout.media] if self.shares else []
        saved = [group[0].rollout.prompt_tokens * (len(group) - 1) for group in sharing]
        return sum(map(sum, lengths)) - sum(saved)


def by_answer(values: torch.Tensor, answers: Sequence[Scored]) -> list[torch.Tensor]:
    """Values at a batch's trained positions [N], apart for each answer."""
    return list(values.detach().float().cpu().split([answer.rollout.length for answer in answers]))


def tokens_of(outputs: Any, batch: Batch, answers: Sequence[Scored], kept_from: float | None) -> Tokens:
    """What the policy loss needs of a batch, on its device. kept_from: the entropy from which on a token counts."""
    owner = owners(outputs, batch)
    device = owner.device

    def joined(value: Callable[[Scored], Any]) -> torch.Tensor | None:
        found = [value(answer) for answer in answers]
        if any(item is None for item in found):
            return None
        return torch.cat([torch.as_tensor(item, dtype=torch.float32) for item in found]).to(device)

    entropies = joined(lambda answer: answer.entropies) if kept_from is not None else None
    return Tokens(
        owner,
        torch.tensor([answer.rollout.length for answer in answers], device=device),
        torch.tensor([answer.advantage for answer in answers], dtype=torch.float32, device=device),
        joined(lambda answer: answer.old),
        joined(lambda answer: answer.plain),
        joined(lambda answer: answer.reference),
        joined(lambda answer: answer.rollout.logprobs),
        entropies >= kept_from if entropies is not None else None,
    )


def live(groups: Sequence[Group]) -> list[list[Scored]]:
    return [[answer for answer in group.answers if answer.live] for group in groups]
