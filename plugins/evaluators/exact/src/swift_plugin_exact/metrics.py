"""Scores in [0, 1] of one answer against its reference: exact match, token F1, ROUGE-L and accuracy.

Each is a pure function of two strings. Perplexity is not here: it is a figure of all rows together (see evaluator.py).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

Score = Callable[[str, str], float]
"""`score(prediction, reference)`."""

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"([+-]?)[$€£]?([0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.([0-9]+))?")
# Scripts written without spaces: each character is a word of its own.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W_{_UNSPACED}]+")


def make_metrics(names: Sequence[str], normalise: bool, part: Callable[[str, str], Any]) -> dict[str, Score]:
    """The text metrics of `names`, perplexity left out. `part("metric", name)` makes those that are not ours."""
    ours: dict[str, Score] = {
        "accuracy": accuracy,
        "exact_match": partial(exact_match, normalise=normalise),
        "token_f1": partial(token_f1, normalise=normalise),
        "rouge_l": RougeL(),
    }
    return {name: ours.get(name) or part("metric", name) for name in names if name != "perplexity"}


def squad_normal(text: str, articles: bool = False) -> str:
    """Lower case, without ASCII punctuation and (unless `articles`) without a, an, the; single spaces.

    Source: `normalize_answer` of SQuAD's evaluate-v1.1.py, https://rajpurkar.github.io/SQuAD-explorer/.
    """
    text = text.lower().translate(_PUNCTUATION)
    return " ".join((text if articles else _ARTICLES.sub(" ", text)).split())


def _comparable(prediction: str, reference: str, normalise: bool) -> tuple[str, str]:
    """Both texts in the form that is compared.

    SQuAD's form of the choice "A" or of the sign "+" is empty, and would equal any other empty one. Where nothing is
    left of a reference, articles stay, and at last the text itself.
    """
    if normalise:
        for articles in (False, True):
            if squad_normal(reference, articles):
                return squad_normal(prediction, articles), squad_normal(reference, articles)
    return prediction.strip(), reference.strip()


def exact_match(prediction: str, reference: str, normalise: bool = True) -> float:
    """1 where the texts are the same: after SQuAD's normalisation, or but for surrounding space."""
    left, right = _comparable(prediction, reference, normalise)
    return float(left == right)


def token_f1(prediction: str, reference: str, normalise: bool = True) -> float:
    """Harmonic mean of precision and recall over the bags of words, split at white space.

    Source: Rajpurkar et al. 2016, section 6.1, https://arxiv.org/abs/1606.05250.
    """
    left, right = (text.split() for text in _comparable(prediction, reference, normalise))
    same = sum((Counter(left) & Counter(right)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(left), same / len(right)
    return 2 * precision * recall / (precision + recall)


class RougeL:
    """F-measure of the longest common subsequence of words, by the `rouge_score` library, without stemming.

    Source: Lin 2004, https://aclanthology.org/W04-1013. The library's own tokenizer keeps a-z and 0-9 alone, so that
    texts in most languages score 0; ours does the same to ASCII text and keeps other letters.
    """

    def __init__(self) -> None:
        self._scorer = RougeScorer(["rougeL"], tokenizer=_Words())

    def __call__(self, prediction: str, reference: str) -> float:
        return float(self._scorer.score(reference, prediction)["rougeL"].fmeasure)


class _Words(Tokenizer):  # type: ignore[misc]
    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())


def accuracy(prediction: str, reference: str) -> float:
    """1 where both texts are the same label: see `label`. It does not depend on the option `normalise`."""
    return float(label(prediction) == label(reference))


def label(text: str) -> str:
    """A class, a choice or a number in the form that `accuracy` compares.

    Lower case, without surrounding punctuation and space; articles and inner punctuation stay, so that choice A, -5 and
    3.14 keep their meaning, which SQuAD's form loses. A number is compared by value: `$1,000.00` is `1000`.
    """
    text = text.strip().lower()
    outer = string.punctuation + string.whitespace
    inner = text.rstrip(outer).lstrip("".join(set(outer) - set("+-.")))  # a sign or a decimal point may lead a number
    number = _NUMBER.fullmatch(inner)
    if number and (number[2] or number[3]):
        whole, fraction = (number[2] or "0").replace(",", "").lstrip("0") or "0", (number[3] or "").rstrip("0")
        value = f"{whole}.{fraction}" if fraction else whole
        return f"-{value}" if number[1] == "-" and value != "0" else value
    return inner.lstrip(outer) or text
