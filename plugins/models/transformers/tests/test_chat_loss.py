"""Loss weights of the templates `checkpoint` and `plain`: strategies, weights of messages, spans by regular expression."""

from __future__ import annotations

from typing import Any

import pytest
from swift_core.config import build_options
from swift_core.errors import RequestError
from swift_core.types import Row, Sample
from swift_plugin_transformers.chat import ChatTemplate
from swift_plugin_transformers.config import ChatTemplateConfig, PlainTemplateConfig
from swift_plugin_transformers.loss_weights import by_regex, overlay, token_weights, trained_spans
from swift_plugin_transformers.plain import PlainTemplate
from swift_plugin_transformers.testing import make_tokenizer

IM = "<|im_end|>"
TALK: list[Row] = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Fine?"},
    {"role": "assistant", "content": "Yes, very."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Sun."},
]
TOOLS = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + (m.content or '') }}{%- for c in m.tool_calls or [] %}"
    "{{- '<call>' + c.function.name + (c.function.arguments | tojson) + '</call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def encode(messages: list[Row], **options: Any) -> tuple[ChatTemplate, list[Sample]]:
    config = build_options(ChatTemplateConfig, options, "template.checkpoint")
    assert config is not None
    template = ChatTemplate(make_tokenizer(), config)
    return template, template.encode({"messages": messages})


def weighed(template: Any, sample: Sample) -> list[tuple[str, float]]:
    """The text in runs of one weight, from the tokens."""
    runs: list[tuple[list[int], float]] = []
    for token, weight in zip(sample.input_ids, sample.weights, strict=True):
        if runs and runs[-1][1] == weight:
            runs[-1][0].append(token)
        else:
            runs.append(([token], weight))
    return [(str(template.tokenizer.decode(ids, skip_special_tokens=False)), weight) for ids, weight in runs]


def trained(messages: list[Row], **options: Any) -> list[tuple[str, float]]:
    template, (sample,) = encode(messages, **options)
    found = [(text, weight) for text, weight in weighed(template, sample) if weight]
    assert [sample.text[start:end] for start, end in sample.spans] == joined(found, sample.text)
    return found


def joined(runs: list[tuple[str, float]], text: str) -> list[str]:
    """Neighbouring runs as one."""
    found: list[str] = []
    for run, _ in runs:
        if found and found[-1] + run in text:
            found[-1] += run
        else:
            found.append(run)
    return found


def with_(index: int, **more: Any) -> list[Row]:
    return [{**message, **more} if n == index else message for n, message in enumerate(TALK)]


def test_strategies() -> None:
    answers = [(f"Yes, very.{IM}", 1.0), (f"Sun.{IM}", 1.0)]
    assert trained(TALK) == trained(TALK, loss="assistant") == answers
    assert trained(TALK, loss="last") == answers[1:]
    template, (sample,) = encode(TALK, loss="all")
    assert weighed(template, sample) == [(sample.text, 1.0)]
    assert (sample.turns, sample.spans) == ([0, 1, 2, 3, 4], [(0, len(sample.text))])


def test_the_last_answer_left_out_leaves_nothing_to_the_strategy_last() -> None:
    with pytest.raises(ValueError, match=r"^the row has no trainable token"):
        encode(with_(4, train=False), loss="last")


def test_weights_of_messages() -> None:
    assert trained(with_(2, weight=0.5)) == [(f"Yes, very.{IM}", 0.5), (f"Sun.{IM}", 1.0)]
    assert trained(with_(2, weight=3)) == [(f"Yes, very.{IM}", 3.0), (f"Sun.{IM}", 1.0)]
    assert trained(with_(2, weight=0)) == trained(with_(2, train=False)) == [(f"Sun.{IM}", 1.0)]
    # Others are not trained by default, whatever their weight.
    assert trained(with_(1, weight=2.0)) == trained(with_(0, train=True)) == trained(TALK)


def test_weights_of_messages_where_all_is_trained() -> None:
    template, (sample,) = encode(with_(1, weight=0.25), loss="all")
    text = sample.text
    question = [(text[: text.index("Fine?")], 1.0), ("Fine?", 0.25), (text[text.index("Fine?") + 5 :], 1.0)]
    assert weighed(template, sample) == question
    template, (sample,) = encode(with_(2, train=False), loss="all")
    assert sample.turns == [0, 1, 3, 4]
    assert [run for run in weighed(template, sample) if run[1] != 1.0] == [("Yes, very.", 0.0)]
    template, (sample,) = encode(with_(2, weight=2), loss="all")
    assert [run for run in weighed(template, sample) if run[1] != 1.0] == [(f"Yes, very.{IM}", 2.0)]


def test_a_call_has_a_weight_like_any_answer() -> None:
    call = {"id": "call00001", "type": "function", "function": {"name": "look", "arguments": {"a": "b"}}}
    messages: list[Row] = [TALK[1], {"role": "assistant", "content": None, "tool_calls": [call], "weight": 2.0}]
    messages += [{"role": "tool", "content": "x", "tool_call_id": "call00001"}, TALK[4]]
    said = f'<call>look{{"a": "b"}}</call>{IM}'
    assert trained(messages, jinja=TOOLS) == [(said, 2.0), (f"Sun.{IM}", 1.0)]
    messages[1] = {**messages[1], "train": False}
    assert trained(messages, jinja=TOOLS) == [(f"Sun.{IM}", 1.0)]


def test_spans_by_regular_expression() -> None:
    """Inside answers only; times the message's weight; groups alone where there are groups; the later pattern wins."""
    rest = [(f"Sun.{IM}", 1.0)]
    assert trained(TALK, spans={"very": 3}) == [("Yes, ", 1.0), ("very", 3.0), (f".{IM}", 1.0), *rest]
    assert trained(TALK, loss="spans", spans={"very|kind|Why": 3}) == trained(TALK, spans={"very": 3})
    assert trained(with_(2, weight=0.5), spans={"very": 3})[1] == ("very", 1.5)
    assert trained(TALK, spans={"Yes, (v)er": 0}) == [("Yes, ", 1.0), (f"ery.{IM}", 1.0), *rest]
    assert trained(TALK, spans={"Yes.*": 2, "very": 0.5})[:3] == [("Yes, ", 2.0), ("very", 0.5), (f".{IM}", 2.0)]
    assert trained(TALK, loss="last", spans={"S|Y": 2}) == [("S", 2.0), (f"un.{IM}", 1.0)]
    template, (sample,) = encode(TALK, loss="all", spans={"very|kind": 2})
    assert [run for run in weighed(template, sample) if run[1] != 1.0] == [("very", 2.0)]


def test_wrong_options_and_weights_are_named() -> None:
    with pytest.raises(RequestError, match=r"^template\.loss=spans needs template\.spans"):
        encode(TALK, loss="spans")
    with pytest.raises(RequestError, match=r"^template\.spans: '\(': "):
        encode(TALK, spans={"(": 2})
    with pytest.raises(RequestError, match=r"^template\.spans: 'a': a message's weight is a number from 0 up, not -1"):
        encode(TALK, spans={"a": -1.0})
    for wrong in (-1, "half", True, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"^a message's weight is a number from 0 up, not "):
            encode(with_(2, weight=wrong))


def test_pieces() -> None:
    import re

    assert overlay([(0, 4, 1.0), (6, 9, 1.0)], (2, 7, 0.0)) == [(0, 2, 1.0), (2, 4, 0.0), (6, 7, 0.0), (7, 9, 1.0)]
    assert by_regex("aXbX", (0, 3, 2.0), [(re.compile("X"), 0.5)]) == [(0, 1, 2.0), (1, 2, 1.0), (2, 3, 2.0)]
    assert trained_spans([(0, 2, 1.0), (2, 4, 0.5), (4, 5, 0.0), (5, 6, 1.0)]) == [(0, 4), (5, 6)]
    # A token that begins before a span is not trained, one that ends after it is; one without characters is not.
    assert token_weights([(0, 2), (1, 4), (3, 6), (5, 5), (6, 7)], [(2, 5, 0.5)]) == [0.0, 0.0, 0.5, 0.0, 0.0]


def test_plain_text_has_weights_of_messages_and_one_first_token() -> None:
    tokenizer = make_tokenizer()
    template = PlainTemplate(tokenizer, PlainTemplateConfig())
    (sample,) = template.encode(
        {"messages": [{"role": "user", "content": "ab"}, {"role": "user", "content": "c", "weight": 0.5}]}
    )
    assert sample.weights == [1.0, 1.0, 0.5, 0.5]  # the end-of-text token counts as the text before it
    assert (sample.spans, sample.turns) == ([(0, 3)], [0, 1])
    (sample,) = template.encode(
        {"messages": [{"role": "user", "content": "ab", "train": False}, {"role": "user", "content": "c"}]}
    )
    assert (sample.weights, sample.spans, sample.turns) == ([0.0, 0.0, 1.0, 1.0], [(2, 3)], [1])

    class First:
        """A tokenizer that writes a first token, as Llama's does."""

        bos_token_id, eos_token_id = tokenizer.convert_tokens_to_ids("<|im_start|>"), tokenizer.eos_token_id

        def __call__(self, text: str, **options: Any) -> Any:
            return tokenizer("<|im_start|>" + text, **options)

    first = PlainTemplate(First(), PlainTemplateConfig())
    ids = [first.encode({"messages": [{"role": "user", "content": text}]})[0].input_ids for text in ("ab", "<|im_start|>ab")]
    assert ids[0] == ids[1]
    assert ids[0].count(First.bos_token_id) == 1
