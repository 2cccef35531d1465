"""What the trainers' options make of the data, the loss of a batch, and which options are refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from swift_core.config import build_options, parse_config
from swift_core.errors import RequestError
from swift_core.events import EventSink
from swift_core.session import Session
from swift_core.types import Batch, ModelBundle, Record, Sample
from swift_plugin_prepare.prepare import prepare
from swift_plugin_supervised.config import PretrainConfig, SupervisedConfig
from swift_plugin_supervised.loop import cross_entropy
from swift_plugin_torch.head import Outputs


def test_cross_entropy_by_hand() -> None:
    """The sum of weight x -log p of each next token; what is not trained does not count, whatever stands there."""
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]])
    weights = torch.tensor([[9.0, 0.5, 0.0, 2.0], [9.0, 0.0, 0.0, 1.0]])  # a first token is predicted by nothing
    logits[:, 1] = math.nan  # predicts the third token, which no row trains
    expected = 0.0
    for row, position in ((0, 1), (0, 3), (1, 3)):
        values = logits[row, position - 1].tolist()
        log_p = values[labels[row, position]] - math.log(sum(math.exp(value) for value in values))
        expected -= float(weights[row, position]) * log_p
    batch = Batch({}, labels, weights, [0, 1], 3.5, 8, 3)
    assert float(cross_entropy(Outputs(logits, None, batch), batch)) == pytest.approx(expected, abs=1e-5)
    half = cross_entropy(Outputs(logits.bfloat16(), None, batch), batch)
    assert half.dtype == torch.float32


@pytest.fixture
def texts() -> list[Record]:
    lengths = (10, 64, 200)
    return [Record({"messages": [{"role": "assistant", "content": "abcdefghij" * 30}]}, "f:0")] + [
        Record({"messages": [{"role": "assistant", "content": ("text " * 60)[:length]}]}, f"f:{length}") for length in lengths
    ]


@pytest.fixture
def plain(tiny_folder: Path) -> Iterator[Any]:
    """The template that trainer `pt` names in its manifest."""
    with Session(parse_config({"model": str(tiny_folder), "trainer": "pt"})) as session:
        ref, entry = session.model_ref, session.trainer.contribution.entry
        assert entry.options["template"] == "plain"
        yield session.template(ref, session.processor(ref), entry.options["template"])


def test_pt_trains_every_token_and_splits_what_is_too_long(plain: Any, texts: list[Record]) -> None:
    config = build_options(PretrainConfig, {"max_length": 64, "batch_size": 3}, "trainer.pt")
    data, account = prepare(texts, [], plain, config, "stop", EventSink())
    # 301 tokens with the end, then 11, 65 and 201: nothing is lost.
    assert [len(sample.input_ids) for sample in data.train] == [64, 64, 64, 64, 45, 11, 64, 1, 64, 64, 64, 9]
    assert all(set(sample.weights) == {1.0} for sample in data.train)
    assert (account.tokens, account.trained_tokens, dict(account.reasons)) == (578, 578, {"split": 3})
    assert plain.decode([token for sample in data.train[:5] for token in sample.input_ids]) == "abcdefghij" * 30


def test_sft_drops_or_cuts_what_is_too_long(tiny_bundle: ModelBundle) -> None:
    messages = [{"role": "user", "content": "q" * 20}, {"role": "assistant", "content": "a" * 20}]
    records = [
        Record({"messages": messages}, "f:1"),
        Record({"messages": [{**messages[0], "content": "q"}, messages[1]]}, "f:2"),
    ]
    whole = tiny_bundle.template.encode(records[0].row)[0]  # type: ignore[union-attr]
    length = len(whole.input_ids)

    def prepared(**options: Any) -> tuple[list[Sample], dict[str, int]]:
        config = build_options(SupervisedConfig, {"max_length": length - 5, **options}, "trainer.sft")
        data, account = prepare(copy.deepcopy(records), [], tiny_bundle.template, config, "stop", EventSink())  # type: ignore[arg-type]
        return data.train, dict(account.reasons)

    dropped, reasons = prepared()
    assert ([sample.row for sample in dropped], reasons) == ([1], {"dropped": 1})
    left, reasons = prepared(overflow="truncate-left")
    assert (left[0].input_ids, reasons) == (whole.input_ids[5:], {"cut": 1})
    right, reasons = prepared(overflow="truncate-right")
    assert (right[0].input_ids, reasons) == (whole.input_ids[:-5], {"answer cut": 1})
    assert right[0].trained_tokens < whole.trained_tokens
    with pytest.raises(RequestError, match=r"^trainer.sft.overflow: expected one of drop, truncate-left, truncate-right, not"):
        build_options(SupervisedConfig, {"overflow": "split"}, "trainer.sft")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"accumulate": 0}, "accumulate must be at least 1, not 0"),
        ({"max_steps": 0}, "max_steps must be at least 1 or null, not 0"),
        ({"patience": 0}, "patience must be at least 1 or null, not 0"),
        ({"epochs": 0}, "epochs must be above 0, not 0"),
        ({"learning_rate": 0}, "learning_rate must be above 0, not 0"),
        ({"warmup": -1}, "warmup must be at least 0"),
        ({"min_rate": 1.5}, "min_rate between 0 and 1"),
        ({"betas": [0.9]}, "betas takes two numbers"),
        ({"betas": [0.9, 1.0]}, "betas takes two numbers of at least 0 and below 1"),
        ({"clip": 0}, "clip must be above 0 or null, not 0"),
        ({"weight_decay": -1}, "weight_decay and keep must be at least 0"),
        ({"keep": -1}, "weight_decay and keep must be at least 0"),
        ({"packing": True, "max_length": None}, "packing needs max_length: the size of a pack"),
        ({"packing": True, "padding": "always"}, "packing lays samples end to end"),
        ({"schedule": "step"}, ".schedule: expected one of cosine, linear, constant, not 'step'"),
    ],
)
def test_wrong_options_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=rf"^trainer.sft.*{message}"):
        build_options(SupervisedConfig, options, "trainer.sft")
