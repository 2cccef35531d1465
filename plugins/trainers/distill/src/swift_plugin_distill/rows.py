"""The row form `distill`: conversations as they are, and prompts without an answer."""

from __future__ import annotations

from swift_core.types import Row, Sample, Template


class DistillRows:
    """A row that ends with an answer becomes what it is for supervised training. One that ends with a question is its prompt,
    with `label["prompt"]`: the model answers it."""

    def encode(self, template: Template, row: Row) -> list[Sample]:
        """Raises ValueError with the reason to refuse the row."""
        messages = row.get("messages") or []
        if messages and messages[-1].get("role") == "assistant":
            return template.encode(row)
        if any(row.get(key) for key in ("images", "videos", "audios")):
            raise ValueError("the row has media and no answer, and the model's own answers take text only so far")
        if not any(message.get("role") != "system" for message in messages):
            raise ValueError("the row asks nothing: messages need one of another role than system")
        kwargs = dict(row.get("chat_template_kwargs") or {})
        ids = list(template.prompt(messages, row.get("tools"), **kwargs))
        # No token is trained. The weight of the last one says where the answer begins, as a row needs a place to learn at.
        return [Sample(ids, [*[0.0] * (len(ids) - 1), 1.0], label={"prompt": True}, kwargs=kwargs)]


def is_prompt(sample: Sample) -> bool:
    return isinstance(sample.label, dict) and bool(sample.label.get("prompt"))


def prompt_of(sample: Sample) -> list[int]:
    """The ids that the sample's last answer continues: all before the last run of trained tokens."""
    if is_prompt(sample):
        return list(sample.input_ids)
    end = max(n for n, weight in enumerate(sample.weights) if weight)
    start = end
    while start and sample.weights[start - 1]:
        start -= 1
    return list(sample.input_ids[:start])
