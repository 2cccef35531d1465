"""The row form of process rewards: a prompt and the steps of an answer, each labelled right or wrong."""

from __future__ import annotations

from typing import Any

from swift_core.types import Row, Sample, Template

IGNORED = -100
SEPARATOR = "\n"  # behind each step; its last token is where the step is judged


class StepRows:
    """`{"prompt" | "messages", "completions": [step, ...], "labels": [true, false, ...], "step_separator"?}`.

    Tokens as in Lightman et al. 2023 (Let's verify step by step, arXiv 2305.20050) and TRL's stepwise rows: each step is
    tokenized alone, and its label stands at the last token of the separator behind it.
    """

    def encode(self, template: Template, row: Row) -> list[Sample]:
        """One sample for the template `tag`. Raises ValueError with the reason to refuse the row."""
        made: Any = template
        steps, labels = row.get("completions"), row.get("labels")
        if not isinstance(steps, list) or not steps or not all(isinstance(step, str) for step in steps):
            raise ValueError("the row has no list 'completions' with the steps of an answer, each a text")
        if not isinstance(labels, list) or len(labels) != len(steps):
            count = len(labels) if isinstance(labels, list) else "no list of"
            raise ValueError(f"the row has {len(steps)} steps in 'completions' and {count} 'labels': one for each is needed")
        separator = row.get("step_separator", SEPARATOR)
        if not isinstance(separator, str) or not separator:
            raise ValueError(f"step_separator must be a text, not {separator!r}")
        end = made.tokens(separator, special=False)["input_ids"]
        ids = list(made.text(row["messages"], row.get("tools"))["input_ids"])
        value = [IGNORED] * len(ids)
        for step, label in zip(steps, labels, strict=True):
            own = [*made.tokens(step, special=False)["input_ids"], *end]
            ids += own
            value += [IGNORED] * (len(own) - 1) + [made.number(int(label) if isinstance(label, bool) else label)]
        limit = made.config.max_length
        text: dict[str, Any] = {"input_ids": ids[:limit]}
        if limit is not None and len(ids) > limit:
            value, text["cut"] = value[:limit], True
        if all(label == IGNORED for label in value):
            raise ValueError(f"prompt and first step are longer than template.max_length, {limit}: no step is left to judge")
        sample: Sample = made.make([text], value)
        sample.weights = [float(label != IGNORED) for label in value]
        return [sample]
