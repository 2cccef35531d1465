"""Row forms: what pairs and labelled answers become, with the model's own template.

Only what was answered to the common prompt is trained: answers further up in a conversation are part of the prompt. A row that
says of a message whether to train it (`train`) is taken at its word.
"""

from __future__ import annotations

from collections.abc import Sequence

from swift_core.parts import join
from swift_core.types import Row, Sample, Template

OF_PAIRS = ("rejected", "label", "margin")


class PairRows:
    """`{"messages", "rejected"}`: two conversations that begin alike, the first of them with the better answer."""

    def encode(self, template: Template, row: Row) -> list[Sample]:
        """One sample of two parts, the chosen one first. Raises ValueError with the reason to refuse the row."""
        return [join(sides(template, row))]


class LabelledRows:
    """`{"messages", "label"}` with true for a good answer; a pair is a good one and a bad one."""

    def encode(self, template: Template, row: Row) -> list[Sample]:
        """One sample, or two of a pair, with `label["good"]`. Raises ValueError with the reason to refuse the row."""
        if row.get("rejected"):
            both = zip(sides(template, row), (True, False), strict=True)
            return [labelled(template, sample, good) for sample, good in both]
        if row.get("label") is None:
            raise ValueError("the row has neither a 'label', true or false, nor a 'rejected' answer")
        messages = row["messages"]
        prompt = 1 + max((n for n, message in enumerate(messages) if message["role"] == "user"), default=-1)
        return [labelled(template, side(template, row, messages, prompt, "row"), is_good(row["label"]))]


def labelled(template: Template, sample: Sample, good: bool) -> Sample:
    """The sample with its label; where the model sees media, with the text of prompt and answer, to join it with other ones."""
    sample.label = {"good": good}
    if getattr(template, "media", None) is not None:
        start = sample.spans[0][0]
        sample.label |= {"asks": sample.text[:start], "says": sample.text[start:]}
    return sample


def is_good(label: object) -> bool:
    """Raises ValueError for what is neither true nor false."""
    said = label.strip().lower() if isinstance(label, str) else label
    if said in (True, 1, "true", "1"):
        return True
    if said in (False, 0, "false", "0"):
        return False
    raise ValueError(f"label {label!r}: expected true for a good answer, false for a bad one")


def sides(template: Template, row: Row) -> list[Sample]:
    """The chosen and the rejected side of a pair. Raises ValueError with the reason to refuse it."""
    if not row.get("rejected"):
        raise ValueError("the row has no 'rejected' answer")
    chosen, rejected = row["messages"], row["rejected"]
    prompt = common(chosen, rejected)
    if prompt == len(chosen) == len(rejected):
        raise ValueError("the chosen and the rejected answer are the same")
    if prompt == 0:
        raise ValueError("the chosen and the rejected conversation have no common prompt: their first messages differ")
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if prompt >= len(messages):
            raise ValueError(f"the {name} conversation has no answer of its own: the other one only goes on from it")
        if messages[prompt]["role"] != "assistant":
            raise ValueError(
                f"the chosen and the rejected conversation have no common prompt: they part at message {prompt}, which in the "
                f"{name} one is of role {messages[prompt]['role']}"
            )
    found = [
        side(template, row, messages, prompt, name) for name, messages in (("chosen side", chosen), ("rejected side", rejected))
    ]
    if found[0].input_ids == found[1].input_ids:
        raise ValueError("the chosen and the rejected answer are the same, as the template writes them")
    starts = [first_trained(sample) for sample in found]
    one, other = (sample.input_ids[:start] for sample, start in zip(found, starts, strict=True))
    if one != other:
        raise ValueError("the two sides have no common prompt: the template writes differently what stands before the answers")
    return found


def side(template: Template, row: Row, messages: Sequence[Row], prompt: int, name: str) -> Sample:
    """A conversation whose first `prompt` messages are what is answered. Raises ValueError."""
    said = [dict(message) for message in messages]
    if not any("train" in message for message in said):
        for message in said[:prompt]:
            if message["role"] == "assistant":
                message["train"] = False
    if not any(message["role"] == "assistant" for message in said[prompt:]):
        raise ValueError(f"the {name} has no answer to its last question")
    try:
        found = template.encode({**{key: value for key, value in row.items() if key not in OF_PAIRS}, "messages": said})
    except ValueError as err:
        raise ValueError(f"the {name}'s conversation: {err}") from err
    if len(found) != 1:
        raise ValueError(
            f"the template makes {len(found)} samples of the {name}'s answers, as it writes earlier ones otherwise than the "
            "last; set train: false on all but the last"
        )
    return found[0]


def common(one: Sequence[Row], other: Sequence[Row]) -> int:
    """With how many equal messages two conversations begin."""
    return next((n for n, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other)))


def first_trained(sample: Sample) -> int:
    return next((n for n, weight in enumerate(sample.weights) if weight), len(sample.weights))
