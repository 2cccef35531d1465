"""Samples that belong together are one sample, and come apart as they were."""

from __future__ import annotations

import pytest
from swift_core.parts import join, parts
from swift_core.types import Sample

CHOSEN = Sample([1, 2, 3], [0.0, 1.0, 1.0], row=4, where="a:5", turns=[1], text="abc", spans=[(1, 3)], notes=["own-sample"])
REJECTED = Sample([1, 9], [0.0, 0.5], row=4, where="a:5", turns=[1], text="ax", spans=[(1, 2)], label={"encoder": 1})


def test_samples_come_apart_as_they_were_joined() -> None:
    joined = join([CHOSEN, REJECTED], margin=0.5)
    assert (joined.input_ids, joined.weights) == ([1, 2, 3, 1, 9], [0.0, 1.0, 1.0, 0.0, 0.5])
    assert (joined.text, joined.spans, joined.notes) == ("abcax", [(1, 3), (4, 5)], ["own-sample"])
    assert joined.label["lengths"] == [3, 2]
    assert joined.label["margin"] == 0.5
    first, second = parts(joined)
    assert (first.input_ids, first.weights, first.text, first.label) == ([1, 2, 3], [0.0, 1.0, 1.0], "abc", None)
    assert (second.input_ids, second.weights, second.text, second.label) == ([1, 9], [0.0, 0.5], "ax", {"encoder": 1})
    assert (second.row, second.where) == (4, "a:5")


def test_a_plain_sample_is_its_only_part() -> None:
    assert parts(CHOSEN) == [CHOSEN]
    assert parts(REJECTED) == [REJECTED]


def test_other_media_are_refused() -> None:
    with pytest.raises(ValueError, match="different media"):
        join([Sample([1], [1.0], media={"images": ["a.png"]}), Sample([1], [1.0])])
