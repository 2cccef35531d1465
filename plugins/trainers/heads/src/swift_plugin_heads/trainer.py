"""The supervised loop with the losses of models with a head, and what an evaluation counts beside the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from swift_core.errors import RequestError
from swift_core.types import Batch, Run, Sample, Samples, Stream, Template, TrainResult
from swift_plugin_supervised.feed import cut
from swift_plugin_supervised.isolation import FAULTS
from swift_plugin_supervised.loop import SupervisedTrainer

from swift_plugin_heads import losses
from swift_plugin_heads.metrics import figures

TASKS = {
    "classify": ("sequence_classification",), "tag": ("token_classification",), "embed": ("embedding",),
    "rerank": ("reranker", "sequence_classification"), "reward": ("reward", "sequence_classification"),
    "prm": ("token_classification",),
}  # fmt: skip
"""Trainers -> the tasks of the models that they train."""

Seen = tuple[str, list[tuple[Any, Any]]]
"""A kind of prediction (see `metrics.figures`), and pairs of predicted and right."""


class HeadTrainer(SupervisedTrainer):
    """Trainers `classify`, `tag`, `embed`, `rerank`, `reward`, `prm`."""

    def __init__(self, trainer_id: str, run: Run) -> None:
        heads: dict[str, Callable[[Any], Head]] = {
            "classify": Classes, "tag": Tags, "embed": Vectors, "rerank": Ranking, "reward": Pairs, "prm": Steps
        }  # fmt: skip
        self.trainer_id, self.head = trainer_id, heads[trainer_id](run)
        super().__init__(run, self.loss, Watch(self.head))

    def fit(self) -> TrainResult:
        bundle = getattr(self.run.models.get("policy"), "bundle", None)
        if bundle is not None and bundle.task not in TASKS[self.trainer_id]:
            raise RequestError(
                f"trainer {self.trainer_id}: the model was loaded for {bundle.task}; set model.task={TASKS[self.trainer_id][0]}"
            )
        if not hasattr(self.run.template, "task") or self.run.template.task not in TASKS[self.trainer_id]:
            needed = "tag" if self.trainer_id == "prm" else self.trainer_id
            raise RequestError(f"trainer {self.trainer_id}: its rows need the template {needed}")
        self.head.check()
        return super().fit()

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        try:
            return self.head.loss(outputs, batch)
        except ValueError as err:
            rows = ", ".join(map(str, batch.rows[:4])) + (", ..." if len(batch.rows) > 4 else "")
            raise RequestError(f"dataset: one of the rows {rows} (the first is 0): {err}") from err

    def _lays_flat(self, steps: Any, window: int) -> bool:
        self.shares = False
        if self.config.padding == "always":
            return False
        data = self.run.data.train
        samples = data.window(window)[0] if isinstance(data, Stream) else data
        flat = judges_apart(steps, self.run.template, samples, share=False)
        self.shares = flat and self.config.share_beginning and judges_apart(steps, self.run.template, samples, share=True)
        return flat

    def _batches(self, samples: list[Sample]) -> Iterator[Batch]:
        template = self.run.template
        for part in cut(samples, getattr(self.run.backend, "pass_tokens", None)) if self.flat else [samples]:
            packed = template.pack(part, share=self.shares) if self.flat else None
            yield template.collate([packed] if packed else part)


def judges_apart(steps: Any, template: Template, samples: Samples, share: bool) -> bool:
    """Whether a model with a head says of texts laid end to end what it says of them padded, to the precision that is computed
    in, and of the last one the same to the last bits whatever the first one holds. share: with beginnings that stand once."""
    if not len(samples):
        return False
    shown = [samples[n] for n in range(min(2, len(samples)))]
    first = shown[0]
    start = first.label["lengths"][0] // 2 if share else 0  # what the texts of a sample share stays
    ids = [*first.input_ids[:start], *(token % 251 + 3 for token in first.input_ids[start:])]
    other = Sample(ids, first.weights, label=first.label)
    try:
        packs = [template.pack(chosen, share=share) for chosen in (shown, [other, *shown[1:]])]
        if packs[0] is None or packs[1] is None or (share and not packs[0].shared):
            return False
        plain = steps.forward("policy", template.collate(shown)).logits
        both, changed = (steps.forward("policy", template.collate([pack])).logits.float() for pack in packs)
    except FAULTS:
        return False
    if both.shape != plain.shape:
        return False
    size, limit = float(plain.abs().max()), 1e-3 if plain.dtype == torch.float32 else 0.1
    leak = float((both - changed)[-1].abs().max()) if len(shown) > 1 else 0.0
    return leak <= 1e-5 * size and float((both - plain).abs().max()) <= limit * size


class Head:
    """What a task makes of a forward pass."""

    def __init__(self, run: Run) -> None:
        self.run, self.config = run, run.trainer_config

    def check(self) -> None:
        """Before training. Raises RequestError for data that nothing can be learned from."""

    def first(self) -> Any:
        """The label of the first sample to train on; None without samples."""
        data = self.run.data.train
        samples = data.window(0)[0] if hasattr(data, "window") else data
        return samples[0].label if len(samples) else None

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        raise NotImplementedError

    def seen(self, outputs: Any, batch: Batch) -> Seen:
        raise NotImplementedError


class Classes(Head):
    kind: str | None = None  # of all labels: that of the first batch

    def check(self) -> None:
        """Inference goes by config.json's problem, so that labels other than one class need it said."""
        label, bundle = self.first(), getattr(self.run.models.get("policy"), "bundle", None)
        if label is None or bundle is None or getattr(bundle.model.config, "problem_type", None):
            return
        value, places = label["value"], bundle.model.config.num_labels
        kind = losses.problem([value])
        if kind == "multi_label":
            raise RequestError("trainer.classify: labels are lists of classes: set model.problem=multi_label")
        if kind == "regression" and (len(value), places) != (1, 1):
            count = f" model.num_labels={len(value)}" if len(value) > 1 else ""
            raise RequestError(f"trainer.classify: labels are numbers: set model.problem=regression{count}")

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        values = batch.targets["value"]
        kind = losses.problem(values)
        self.kind = self.kind or kind
        if kind != self.kind:
            raise ValueError(f"its labels are for {kind}, those before for {self.kind}; set model.problem to what is meant")
        return losses.classification(outputs.logits, values)

    def seen(self, outputs: Any, batch: Batch) -> Seen:
        logits, values = outputs.logits.float().cpu(), batch.targets["value"]
        kind = losses.problem(values)
        if kind == "single_label":
            return kind, list(zip(logits.argmax(1).tolist(), values, strict=True))
        if kind == "multi_label":
            return kind, [([n for n, x in enumerate(row) if x > 0], value) for row, value in zip(logits, values, strict=True)]
        return kind, list(zip(logits.tolist(), values, strict=True))


class Tags(Head):
    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        return losses.tagging(outputs.logits, batch.targets["value"])

    def seen(self, outputs: Any, batch: Batch) -> Seen:
        found = []
        for row, value in zip(outputs.logits.argmax(-1).tolist(), batch.targets["value"], strict=True):
            places = [n for n, label in enumerate(value) if label != losses.IGNORED]
            found.append(([row[n] for n in places], [value[n] for n in places]))
        return "tag", found


class Steps(Tags):
    def seen(self, outputs: Any, batch: Batch) -> Seen:
        return "steps", super().seen(outputs, batch)[1]


class Vectors(Head):
    def check(self) -> None:
        first = self.first()
        alone = not self.config.in_batch or (self.config.batch_size == 1 and self.config.batch_tokens is None)
        if alone and first and len(first["lengths"]) == 2 and first["value"] is None:
            raise RequestError(
                "trainer.embed: rows without negatives are compared with the other rows of a pass: set batch_size above 1"
            )

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        vectors, values = self._vectors(outputs, batch), batch.targets["value"]
        if self._alike(values):
            return losses.cosent(self._cosines(vectors), torch.tensor(values, device=vectors.device), self.config.temperature)
        queries, documents, own, allowed = self._candidates(vectors, batch)
        return losses.infonce(queries, documents, own, self.config.temperature, allowed)

    def seen(self, outputs: Any, batch: Batch) -> Seen:
        vectors, values = self._vectors(outputs, batch), batch.targets["value"]
        if self._alike(values):
            return "alike", list(zip(self._cosines(vectors).tolist(), values, strict=True))
        queries, documents, own, allowed = self._candidates(vectors, batch)
        scores = (queries @ documents.t()).masked_fill(~allowed, float("-inf"))
        mine = scores.gather(1, own[:, None])
        return "rank", [(rank, 1) for rank in (1 + (scores > mine).sum(1)).tolist()]

    def _vectors(self, outputs: Any, batch: Batch) -> torch.Tensor:
        found: torch.Tensor = self.run.template.vectors(outputs.logits, batch.inputs["attention_mask"])  # type: ignore[attr-defined]
        return found

    def _alike(self, values: list[Any]) -> bool:
        """Whether a batch's rows are pairs with a label. Raises ValueError where only some are, or the loss asks otherwise."""
        labelled = {value is not None for value in values}
        if len(labelled) > 1:
            raise ValueError("some rows have a 'positive' and some a 'document' with a label: train on one kind")
        wanted = {"auto": labelled, "infonce": {False}, "cosent": {True}}[self.config.loss]
        if labelled != wanted:
            raise ValueError(f"trainer.loss={self.config.loss} needs rows with a {'label' if True in wanted else 'positive'!r}")
        return labelled == {True}

    def _cosines(self, vectors: torch.Tensor) -> torch.Tensor:
        return (vectors[0::2] * vectors[1::2]).sum(1)

    def _candidates(self, vectors: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, ...]:
        """Queries, documents, the place of each query's own, and which documents it is compared with: those of the pass,
        without a second copy of its own."""
        first = torch.tensor(_starts(batch.targets["lengths"]), device=vectors.device)
        is_query = torch.zeros(len(vectors), dtype=torch.bool, device=vectors.device)
        is_query[first] = True
        texts = batch.labels.to(vectors.device)[~is_query]
        own = first - torch.arange(len(first), device=vectors.device)  # its positive comes right behind it
        allowed = (texts[None] != texts[own][:, None]).any(-1)
        if not self.config.in_batch:
            row = torch.repeat_interleave(
                torch.arange(len(first), device=vectors.device),
                torch.tensor([n - 1 for n in batch.targets["lengths"]], device=vectors.device),
            )
            allowed &= row[None] == torch.arange(len(first), device=vectors.device)[:, None]
        allowed[torch.arange(len(own)), own] = True
        return vectors[is_query], vectors[~is_query], own, allowed


class Ranking(Head):
    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        return losses.ranking(outputs.logits[:, 0], batch.targets["lengths"], batch.targets["value"])

    def seen(self, outputs: Any, batch: Batch) -> Seen:
        parts, values = outputs.logits[:, 0].float().cpu().split(batch.targets["lengths"]), batch.targets["value"]
        if any(value is not None for value in values):
            labelled = [(part, value) for part, value in zip(parts, values, strict=True) if value is not None]
            return "single_label", [(int(part[0] > 0), int(value > 0.5)) for part, value in labelled]
        return "rank", [(1 + int((part[1:] > part[0]).sum()), 1) for part in parts]


class Pairs(Head):
    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        return losses.bradley_terry(outputs.logits[:, 0], batch.targets["value"], self.config.center)

    def seen(self, outputs: Any, batch: Batch) -> Seen:
        scores = outputs.logits[:, 0].float().cpu().view(-1, 2).tolist()
        return "pair", [(better, worse) for better, worse in scores]


class Watch:
    """Collects what an evaluation predicts, on all ranks."""

    def __init__(self, head: Head) -> None:
        self.head = head
        self.found: list[Seen] = []

    def watching(self, loss_fn: Callable[[Any, Batch], torch.Tensor]) -> Callable[[Any, Batch], torch.Tensor]:
        """`loss_fn`, noting what it sees."""
        self.found = []

        def watched(outputs: Any, batch: Batch) -> torch.Tensor:
            loss = loss_fn(outputs, batch)
            self.found.append(self.head.seen(outputs, batch))
            return loss

        return watched

    def result(self) -> dict[str, float]:
        """The figures over all ranks. Collective."""
        everyone: list[Any] = [self.found]
        if dist.is_available() and dist.is_initialized():
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, self.found)
        seen = [item for found in everyone for item in found]
        return figures(seen[0][0], [pair for _, pairs in seen for pair in pairs]) if seen else {}


def _starts(lengths: list[int]) -> list[int]:
    return [sum(lengths[:n]) for n in range(len(lengths))]
