"""/v1/embeddings and /v1/rerank: what a model with a head says of texts, in the form that it was trained on."""

from __future__ import annotations

import base64
import math
import struct
from typing import Any
from uuid import uuid4

from swift_core.types import Sample

from swift_plugin_serve.errors import ApiError
from swift_plugin_serve.generation import called
from swift_plugin_serve.schemas import EmbeddingRequest, RerankRequest
from swift_plugin_serve.served import Served


async def embeddings(served: Served, body: EmbeddingRequest) -> dict[str, Any]:
    """Vectors of length 1. Raises ApiError 400 for a model that is no embedder."""
    _base(served, body.model)
    served.needs("embed", "embeddings need a model with a pooled head, such as one of `train --trainer embed`")
    given: list[Any] = body.input if isinstance(body.input, list) and not isinstance(body.input[0], int) else [body.input]

    def work() -> tuple[list[list[int]], list[list[float]]]:
        sequences = [list(item) if isinstance(item, list) else _query(served, item) for item in given]
        _check(served, sequences)
        return sequences, served.engine.embed(sequences)

    sequences, vectors = await called(served, work)
    data = [
        {"object": "embedding", "index": n, "embedding": _coded(_short(vector, body.dimensions), body.encoding_format)}
        for n, vector in enumerate(vectors)
    ]
    return {"object": "list", "data": data, "model": body.model, "usage": _usage(sequences)}


async def rerank(served: Served, body: RerankRequest) -> dict[str, Any]:
    """Documents by how well they answer the query. The score is the logistic function of what the model gives."""
    _base(served, body.model)
    served.needs("score", "rerank needs a model that scores pairs, such as one of `train --trainer rerank`")
    documents = [item if isinstance(item, str) else item.text for item in body.documents]

    def work() -> tuple[list[list[int]], list[float]]:
        template: Any = served.template
        if getattr(template, "task", None) != "reranker":
            raise ApiError(400, f"{served.name} does not rank documents: its template is none of a reranker")
        row = {"messages": [{"role": "user", "content": body.query}], "documents": documents}
        sample: Sample = template.sample(row, labelled=False)
        sequences, at = [], 0
        for length in sample.label["lengths"]:
            sequences.append(sample.input_ids[at : at + length])
            at += length
        _check(served, sequences)
        engine: Any = served.engine
        found = engine.predict([sample])[0]["scores"] if hasattr(engine, "predict") else engine.score(sequences)
        return sequences, found

    sequences, scores = await called(served, work)
    ranked = sorted(range(len(scores)), key=lambda n: -scores[n])[: body.top_n]
    results = [
        {"index": n, "relevance_score": _logistic(scores[n])}
        | ({"document": {"text": documents[n]}} if body.return_documents else {})
        for n in ranked
    ]
    return {"id": f"rerank-{uuid4().hex}", "model": body.model, "results": results, "usage": _usage(sequences)}


def _base(served: Served, model: str) -> None:
    if served.adapter(model) is not None:
        raise ApiError(400, f"{model} is an adapter: this is asked of {served.name} itself", param="model")


def _query(served: Served, text: str) -> list[int]:
    """A text's ids as the embedder was trained on them."""
    template: Any = served.template
    row = {"messages": [{"role": "user", "content": text}]}
    if hasattr(template, "sample"):
        return list(template.sample(row, labelled=False).input_ids)
    return served.tokenizer.encode(text)


def _check(served: Served, sequences: list[list[int]]) -> None:
    longest = max(len(ids) for ids in sequences)
    if served.context is not None and longest > served.context:
        message = f"a text has {longest} tokens, and {served.name} takes {served.context}"
        raise ApiError(400, message, code="context_length_exceeded", param="input")
    if served.tokens is not None and (far := max(token for ids in sequences for token in ids)) >= served.tokens.count:
        raise ApiError(400, f"input: no token {far}; there are {served.tokens.count}", param="input")


def _short(vector: list[float], dimensions: int | None) -> list[float]:
    if dimensions is None:
        return vector
    if dimensions > len(vector):
        raise ApiError(400, f"dimensions: the model's vectors have {len(vector)}", param="dimensions")
    part = vector[:dimensions]
    norm = math.sqrt(sum(value * value for value in part)) or 1.0
    return [value / norm for value in part]


def _coded(vector: list[float], form: str | None) -> list[float] | str:
    """base64 holds little-endian float32."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() if form == "base64" else vector


def _logistic(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))


def _usage(sequences: list[list[int]]) -> dict[str, int]:
    count = sum(len(ids) for ids in sequences)
    return {"prompt_tokens": count, "total_tokens": count}
