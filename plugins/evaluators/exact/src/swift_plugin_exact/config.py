"""Options of the evaluator `exact`. Torch-free."""

from __future__ import annotations

import re
from dataclasses import dataclass

from swift_core.config import option


@dataclass
class ExactConfig:
    """`evaluator: {name: exact, metrics: [accuracy], extract: '####\\s*(.+)'}`."""

    metrics: list[str] = option(
        ["exact_match", "token_f1", "rouge_l", "perplexity"],
        "accuracy, exact_match, token_f1, rouge_l, perplexity, or the id of an installed part of kind metric",
    )
    max_tokens: int = option(256, "longest answer, in tokens")
    normalise: bool = option(True, "exact_match and token_f1 ignore case, punctuation and articles, as SQuAD does")
    extract: str | None = option(None, "regex whose last match, or its group, is the answer, in prediction and reference")
    limit: int | None = option(None, "evaluate the first rows only: how many")

    def __post_init__(self) -> None:
        if not self.metrics:
            raise ValueError("metrics is empty; name at least one, such as exact_match")
        twice = sorted({name for name in self.metrics if self.metrics.count(name) > 1})
        if twice:
            raise ValueError(f"metrics names {twice[0]!r} twice")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, not {self.limit}")
        if self.extract is not None:
            try:
                re.compile(self.extract)
            except re.error as err:
                raise ValueError(f"extract is not a regular expression: {err}") from None
