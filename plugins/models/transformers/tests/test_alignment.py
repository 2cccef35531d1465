"""Weights of expanded texts: from the spans a processor tells, and from the ids alone. Expected values are written by hand."""

from __future__ import annotations

import random

import pytest
from swift_plugin_transformers.alignment import Unaligned, mapped_back, matched

IMG, P = 90, 91  # the token of an image, and what is written about it


def test_offsets_go_back_by_what_each_expansion_gained() -> None:
    """`ab*cd*e`, where the first star becomes four characters and the second two."""
    offsets = [(0, 0), (0, 2), (2, 4), (4, 6), (6, 8), (8, 10), (10, 11)]
    found, counts = mapped_back(offsets, [(2, 3, 2, 6), (5, 6, 8, 10)])
    assert found == [(0, 0), (0, 2), (0, 0), (0, 0), (3, 5), (0, 0), (6, 7)]
    assert counts == [2, 1]


def test_a_token_across_the_border_of_an_expansion_is_part_of_it() -> None:
    found, counts = mapped_back([(0, 1), (1, 3), (3, 5), (5, 7), (7, 8)], [(2, 3, 2, 6)])
    assert found == [(0, 1), (0, 0), (0, 0), (0, 0), (4, 5)]
    assert counts == [3]


def test_an_expansion_to_nothing_moves_what_follows_back() -> None:
    assert mapped_back([(0, 2), (2, 4)], [(2, 5, 2, 2)]) == ([(0, 2), (5, 7)], [0])


@pytest.mark.parametrize("seed", range(40))
def test_matching_finds_what_was_expanded(seed: int) -> None:
    """Random texts with random expansions, some with text of their own in them."""
    chance = random.Random(seed)
    ids: list[int] = []
    weights: list[float] = []
    media: list[bool] = []
    expanded: list[int] = []
    expected: list[float] = []
    counts = []
    for _ in range(chance.randint(1, 4)):
        question = [chance.randint(0, 3) for _ in range(chance.randint(1, 4))]
        answer = [chance.randint(4, 30) for _ in range(chance.randint(1, 5))] + [40]
        own = [P, *[IMG] * chance.randint(1, 6), P]
        ids += [50, IMG, *question, 51, *answer]
        weights += [0.0] * (3 + len(question)) + [1.0] * len(answer)
        media += [False, True] + [False] * (len(question) + 1 + len(answer))
        expanded += [50, *own, *question, 51, *answer]
        expected += [0.0] * (1 + len(own) + len(question) + 1) + [1.0] * len(answer)
        counts.append(len(own))
    found = matched(ids, weights, media, expanded)
    assert (found.ids, found.weights, found.counts) == (expanded, expected, counts)


def test_tokens_that_merged_with_an_expansion_are_not_trained() -> None:
    """The line end before and after the picture became one token with those of the expansion."""
    found = matched(
        [1, 10, IMG, 10, 2, 3], [0, 0, 0, 0, 0, 1.0], [False, False, True, False, False, False], [1, 99, IMG, IMG, 98, 2, 3]
    )
    assert found.weights == [0, 0, 0, 0, 0, 0, 1.0]
    assert found.counts == [4]


def test_tokens_that_the_processor_adds_around_the_text_are_not_trained() -> None:
    """As PaliGemma's does: the first token moves behind the picture, and a line end follows the answer."""
    found = matched([1, IMG, 5, 2, 3], [0, 0, 0, 1.0, 1.0], [False, True, False, False, False], [IMG, IMG, 1, 5, 2, 3, 10])
    assert found.weights == [0, 0, 0, 0, 1.0, 1.0, 0]


def test_a_trained_token_is_never_taken_for_one_that_merged() -> None:
    with pytest.raises(Unaligned, match="changes the text around its media"):
        matched([1, IMG, 10, 2], [0, 0, 1.0, 1.0], [False, True, False, False], [1, IMG, IMG, 98, 2])


def test_two_readings_with_other_weights_are_refused() -> None:
    """The answer `7 8` between two pictures stands twice in what they became."""
    ids, weights, media = [1, IMG, 7, 8, IMG, 2], [0, 0, 1.0, 1.0, 0, 0], [False, True, False, False, True, False]
    with pytest.raises(Unaligned, match="cannot be told which"):
        matched(ids, weights, media, [1, IMG, 7, 8, IMG, 7, 8, IMG, 2])
    assert matched(ids, weights, media, [1, IMG, 7, 8, IMG, IMG, 2]).weights == [0, 0, 1.0, 1.0, 0, 0, 0]


def test_a_text_that_the_processor_changed_is_refused() -> None:
    with pytest.raises(Unaligned, match="changes the text"):
        matched([*range(9), IMG, 6], [0.0] * 10 + [1.0], [False] * 9 + [True, False], [0, 1, 2, 3, 99, 5, 6, 7, 8, IMG, IMG, 6])
