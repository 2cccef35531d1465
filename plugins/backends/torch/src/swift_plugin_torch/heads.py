"""Inference with models that have a head: labels with probabilities, vectors, scores. Padded batches, shortest texts first.

The template says how a row becomes texts, and how states become a vector; the model's config.json names the classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from swift_core.errors import CapabilityError, RequestError
from swift_core.types import Batch, Sample

from swift_plugin_torch.head import told

CAPABILITIES = {
    "embedding": {"predict", "embed"}, "sequence_classification": {"predict", "score"}, "reranker": {"predict", "score"},
    "reward": {"predict", "score"}, "token_classification": {"predict"},
}  # fmt: skip
"""What an engine can do with a model of a task, beside nothing else: such a model does not generate."""


def predict(engine: Any, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """For each sample what its template's task asks for: `label` and `probabilities`, `labels`, `values`, `tags`, `vector`,
    `scores` or `score`."""
    template = engine.template
    if not hasattr(template, "task"):
        raise RequestError(
            f"model {engine.bundle.source} has a head for {engine.bundle.task}: name the template that its rows need, such as "
            "template=classify, tag, embed, rerank or reward"
        )
    results: list[dict[str, Any]] = [{} for _ in samples]
    for indexes, outputs, batch in _passes(engine, samples):
        read = _readers(engine, template.task)
        at = 0
        for row, index in enumerate(indexes):
            count = batch.targets["lengths"][row]
            results[index] = read(outputs[at : at + count], samples[index], batch.inputs["attention_mask"][at : at + count])
            at += count
    return results


def embed(engine: Any, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    """A vector of length 1 for each sequence. Raises CapabilityError for a model that is no embedder."""
    if engine.bundle.task != "embedding" or not hasattr(engine.template, "vectors"):
        raise CapabilityError(f"engine transformers does not embed with this model: its task is {engine.bundle.task}")
    return [found["vector"] for found in predict(engine, [_alone(ids) for ids in sequences])]


def score(engine: Any, sequences: Sequence[Sequence[int]]) -> list[float]:
    """One number for each sequence. Raises CapabilityError for a model that gives none, or several."""
    if "score" not in CAPABILITIES.get(engine.bundle.task, ()) or engine.model.config.num_labels != 1:
        raise CapabilityError(f"engine transformers does not score with this model: its task is {engine.bundle.task}")
    results = [0.0] * len(sequences)
    for indexes, outputs, _ in _passes(engine, [_alone(ids) for ids in sequences]):
        for row, index in enumerate(indexes):
            results[index] = float(outputs[row, 0])
    return results


def outputs(engine: Any, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    """All numbers that the model gives for each sequence alone: what two copies of a model are compared by."""
    results: list[list[float]] = [[] for _ in sequences]
    for indexes, found, batch in _passes(engine, [_alone(ids) for ids in sequences]):
        for row, index in enumerate(indexes):
            whole = found[row] if found.ndim < 3 else found[row, : int(batch.inputs["attention_mask"][row].sum())]
            results[index] = whole.flatten().tolist()
    return results


def _alone(ids: Sequence[int]) -> Sample:
    return Sample(list(ids), [1.0] * len(ids), label={"value": None, "lengths": [len(ids)]})


def _passes(engine: Any, samples: Sequence[Sample]) -> Iterator[tuple[list[int], torch.Tensor, Batch]]:
    """Which samples a pass holds, what the model said of their texts, in float32, and the batch."""
    order = sorted(range(len(samples)), key=lambda n: len(samples[n].input_ids))
    for start in range(0, len(order), engine.config.whole):
        indexes = order[start : start + engine.config.whole]
        batch = engine.template.collate([samples[n] for n in indexes])
        inputs = {name: tensor.to(engine.device) for name, tensor in batch.inputs.items()}
        with torch.inference_mode(), engine._adapter(None):
            yield indexes, told(engine.model, inputs).float().cpu(), batch


def _readers(engine: Any, task: str) -> Any:
    """How the texts' outputs of one sample are read."""
    config = engine.model.config
    names = config.id2label

    def classes(outputs: torch.Tensor, sample: Sample, mask: torch.Tensor) -> dict[str, Any]:
        if config.problem_type == "regression" or (config.num_labels == 1 and config.problem_type is None):
            return {"values": outputs[0].tolist()}
        if config.problem_type == "multi_label_classification":
            shares = outputs[0].sigmoid().tolist()
            chosen = [names[n] for n, share in enumerate(shares) if share > 0.5]
            return {"labels": chosen, "probabilities": {names[n]: share for n, share in enumerate(shares)}}
        shares = outputs[0].softmax(-1).tolist()
        best = max(range(len(shares)), key=shares.__getitem__)
        return {"label": names[best], "probabilities": {names[n]: share for n, share in enumerate(shares)}}

    def tags(outputs: torch.Tensor, sample: Sample, mask: torch.Tensor) -> dict[str, Any]:
        places = engine.template.tokens(sample.text, offsets=True)["offset_mapping"]
        shares = outputs[0].softmax(-1)
        found = []
        for n, (start, end) in enumerate(places[: int(mask.sum())]):
            if start < end:
                best = int(shares[n].argmax())
                found.append({"start": start, "end": end, "label": names[best], "probability": float(shares[n, best])})
        return {"tags": found}

    def vector(outputs: torch.Tensor, sample: Sample, mask: torch.Tensor) -> dict[str, Any]:
        return {"vector": engine.template.vectors(outputs, mask)[0].tolist()}

    def scores(outputs: torch.Tensor, sample: Sample, mask: torch.Tensor) -> dict[str, Any]:
        return {"scores": outputs[:, 0].tolist()}

    def reward(outputs: torch.Tensor, sample: Sample, mask: torch.Tensor) -> dict[str, Any]:
        return {"score": float(outputs[0, 0])}

    return {
        "sequence_classification": classes, "token_classification": tags, "embedding": vector, "reranker": scores,
        "reward": reward,
    }[task]  # fmt: skip
