"""The text metrics against values worked out by hand, and ROUGE-L against the library's own tokenizer."""

from __future__ import annotations

import pytest
from rouge_score.rouge_scorer import RougeScorer
from swift_core.errors import RequestError
from swift_core.testing import PartContract
from swift_plugin_exact.metrics import RougeL, accuracy, exact_match, label, make_metrics, squad_normal, token_f1


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Quick, brown fox!", "quick brown fox"),
        ("An apple a day", "apple day"),
        ("Theatre", "theatre"),
        ("U.S.A.", "usa"),
        ("l'été", "lété"),
    ],
)
def test_squad_normal(text: str, normal: str) -> None:
    assert squad_normal(text) == normal


@pytest.mark.parametrize(
    ("prediction", "reference", "normalised", "plain"),
    [
        ("The Eiffel Tower.", "eiffel tower", 1, 0),
        (" Paris\n", "Paris", 1, 1),
        ("London", "Paris", 0, 0),
        ("A", "A", 1, 1),
        ("the", "A", 0, 0),  # SQuAD's form of both is empty
        ("", "A", 0, 0),
        ("-", "+", 0, 0),
        ("+", "+", 1, 1),
    ],
)
def test_exact_match(prediction: str, reference: str, normalised: int, plain: int) -> None:
    assert exact_match(prediction, reference, normalise=True) == normalised
    assert exact_match(prediction, reference, normalise=False) == plain


def test_token_f1() -> None:
    # "cat sat" against "cat sat on mat": precision 2/2, recall 2/4
    assert token_f1("The cat sat.", "a cat sat on the mat") == pytest.approx(2 * 1 * 0.5 / 1.5)
    # bags of words: the second "go" has no partner. precision 2/3, recall 2/2
    assert token_f1("go go home", "home go") == pytest.approx(0.8)
    assert token_f1("dog", "cat") == 0
    assert token_f1("", "cat") == 0
    # as they are: "The" and "sat." match nothing. precision 1/3, recall 1/2
    assert token_f1("The cat sat.", "cat sat", normalise=False) == pytest.approx(0.4)


def test_rouge_l() -> None:
    score = RougeL()
    # longest common subsequence "police the gunman": 3 of 4 words on both sides (Lin 2004, section 3.1)
    assert score("police kill the gunman", "police killed the gunman") == pytest.approx(0.75)
    assert score("the gunman kill police", "police killed the gunman") == pytest.approx(0.5)
    library = RougeScorer(["rougeL"])
    left, right = "It's 3.5-fold; the END_of all.", "the end of It's 3 fold"
    assert score(left, right) == library.score(right, left)["rougeL"].fmeasure > 0


def test_rouge_l_keeps_other_scripts() -> None:
    score = RougeL()
    assert score("我喜欢猫", "我喜欢狗") == pytest.approx(0.75)
    assert score("добрый день", "добрый вечер") == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A", "a"),
        ("(B).", "b"),
        ("**Positive**!", "positive"),
        ("the cat", "the cat"),
        ("$1,000.00", "1000"),
        ("-5", "-5"),
        ("(-5)", "-5"),
        ("-$5.", "-5"),
        (".50", "0.5"),
        ("007", "7"),
        ("-0.0", "0"),
        ("3.14", "3.14"),
        ("1,2", "1,2"),  # a list, not 12
        ("+", "+"),
        ("not-good", "not-good"),
        ("-good", "good"),
    ],
)
def test_label(text: str, expected: str) -> None:
    assert label(text) == expected


def test_accuracy_differs_from_exact_match() -> None:
    for prediction, reference, same in [("5", "-5", 0), ("314", "3.14", 0), ("$1,000.00", "1000", 1), ("B.", "b", 1)]:
        assert accuracy(prediction, reference) == same
    assert exact_match("5", "-5") == 1
    assert exact_match("$1,000.00", "1000") == 0


def test_other_names_are_parts() -> None:
    asked = []

    def part(kind: str, name: str) -> object:
        asked.append((kind, name))
        if name != "length":
            raise RequestError(f"no metric {name!r}")
        return lambda prediction, reference: float(len(prediction) == len(reference))

    metrics = make_metrics(["length", "perplexity", "accuracy"], True, part)
    assert list(metrics) == ["length", "accuracy"]
    assert asked == [("metric", "length")]
    assert metrics["length"]("ab", "cd") == 1
    with pytest.raises(RequestError, match="blue"):
        make_metrics(["blue"], True, part)


class TestAccuracyPart(PartContract):
    distribution, id = "swift-plugin-exact", "metric/accuracy"


class TestExactMatchPart(PartContract):
    distribution, id = "swift-plugin-exact", "metric/exact_match"


class TestTokenF1Part(PartContract):
    distribution, id = "swift-plugin-exact", "metric/token_f1"


class TestRougePart(PartContract):
    distribution, id = "swift-plugin-exact", "metric/rouge_l"
