"""What each reward gives for answers whose worth is known."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from swift_core.errors import RequestError, RunError
from swift_core.testing import PartContract
from swift_core.types import Completion
from swift_plugin_rewards.accuracy import Accuracy, Worker, final
from swift_plugin_rewards.answer import Answer, answer_of
from swift_plugin_rewards.asking import reference_of
from swift_plugin_rewards.build import BUILDERS
from swift_plugin_rewards.config import (
    AccuracyConfig,
    CosineConfig,
    FormatConfig,
    LengthConfig,
    OverlongConfig,
    RepetitionConfig,
    ToolCallConfig,
)


class TestAccuracy(PartContract):
    distribution, id = "swift-plugin-rewards", "reward/accuracy"


class TestFormat(PartContract):
    distribution, id = "swift-plugin-rewards", "reward/format"


class TestCosine(PartContract):
    distribution, id, options = "swift-plugin-rewards", "reward/cosine", {"max_tokens": 100}


class TestRepetition(PartContract):
    distribution, id = "swift-plugin-rewards", "reward/repetition"


class TestLength(PartContract):
    distribution, id = "swift-plugin-rewards", "reward/length"


class TestOverlong(PartContract):
    distribution, id, options = "swift-plugin-rewards", "reward/soft_overlong", {"max_tokens": 100}


class TestCode(PartContract):
    distribution, id = "swift-plugin-rewards", "reward/code"


class TestToolCall(PartContract):
    distribution, id = "swift-plugin-rewards", "reward/tool_call"


def row(answer: str | None = None, **more: Any) -> dict[str, Any]:
    said = [{"role": "assistant", "content": answer}] if answer is not None else []
    return {"messages": [{"role": "user", "content": "q"}, *said], **more}


def made(name: str, run: Any = None, **options: Any) -> Any:
    cls = {
        "format": FormatConfig, "cosine": CosineConfig, "repetition": RepetitionConfig, "length": LengthConfig,
        "soft_overlong": OverlongConfig, "tool_call": ToolCallConfig,
    }[name]  # fmt: skip
    return BUILDERS[name](cls(**options), run)


def tokens(count: int, text: str = "x") -> Answer:
    return Answer(text, token_ids=[5] * count)


# --- accuracy ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.close()


def accuracy(worker: Worker, **options: Any) -> Accuracy:
    reward = Accuracy(AccuracyConfig(**options))
    reward.worker = worker
    return reward


@pytest.mark.parametrize(
    ("gold", "said", "worth"),
    [
        ("42", "6 times 7 is 42.", 1),
        ("42", "6 times 7 is 41.", 0),
        (r"\frac12", r"so \boxed{0.5}", 1),
        ("x^2+1", r"\boxed{1+x^2}", 1),
        ("x^2+1", r"\boxed{1}", 0),  # not the last number of the right answer
        (r"$\{1,2\}$", r"\boxed{\{2,1\}}", 1),
        (r"2\sqrt{2}", r"$\sqrt{8}$", 1),
        ("10,000", "10000", 1),
        ("12 apples", "There are 12.", 1),
        ("8*9=72\n#### 72", "<think>71? no</think> 72", 1),
        ("5", "<think>5</think><answer>6</answer>", 0),
        ("5", "<answer>5</answer> out of 6", 1),
        ("B", r"The answer is \boxed{B}.", 1),
        ("B", "Answer: C", 0),
        ("yes", "yes", None),  # no mathematics
    ],
)
def test_accuracy(worker: Worker, gold: str, said: str, worth: float | None) -> None:
    assert accuracy(worker)([said], [row(solution=gold)]) == [worth]


def test_accuracy_by_text_only_where_asked(worker: Worker) -> None:
    rows = [row("Yes"), row("3"), row()]
    assert accuracy(worker)(["yes.", "4", "4"], rows) == [None, 0, None]
    assert accuracy(worker, text=True)(["yes.", "4", "4"], rows) == [1, 0, None]
    assert accuracy(worker, boxed=True)(["it is 3", r"it is \boxed{3}, not 4"], [rows[1]] * 2) == [0, 1]
    assert accuracy(worker, reference="gold")(["it is 3"], [row("4", gold=3)]) == [1]
    assert reference_of(row("4", solution="5")) == "5"
    assert reference_of(row("4", label=True)) == "4"
    assert final("<think>1</think> 2") == "2"


def test_a_comparison_that_takes_too_long_is_wrong_and_the_next_one_is_made(worker: Worker) -> None:
    reward = accuracy(worker, timeout=2.0)
    begun = time.monotonic()
    hard = "$" + "(x+1)^{9999999}" * 3 + "$"
    assert reward([hard, "2"], [row(solution="$x^{123456789^{123456789}}$"), row(solution="2")])[1] == 1
    assert time.monotonic() - begun < 60


def test_a_worker_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(RunError, match="reward accuracy: math-verify did not start: no answer"):
        Worker().ask([{"gold": "1", "said": "1", "boxed": False}], 5.0)


# --- form and length --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said", "worth"),
    [
        ({}, "<think>a\nb</think>\nc", 1),
        ({}, "<think>a</think>", 0),
        ({}, "a</think> c", 0),
        ({"opened": True}, "a</think> c", 1),
        ({}, "<think>a<think>b</think> c", 0),
        ({"form": "think_answer"}, "<think>a</think>\n<answer>b</answer>\n", 1),
        ({"form": "think_answer"}, "<think>a</think> so <answer>b</answer>", 0),
        ({"form": "think_answer"}, "<think>a</think><answer>b</answer> and more", 0),
        ({"pattern": r"\d+"}, "123", 1),
        ({"pattern": r"\d+"}, "123 ", 0),
    ],
)
def test_format(options: dict[str, Any], said: str, worth: float) -> None:
    assert made("format", **options)([said], [row()]) == [worth]


def test_format_reads_reasoning_that_the_template_took_apart() -> None:
    assert made("format")([Answer("c", raw="<think>a</think>c"), "c"], [row()] * 2) == [1, 0]


def test_a_long_answer_is_matched_in_no_time() -> None:
    begun = time.monotonic()
    made("format", form="think_answer")(["<think>" + "a " * 100_000], [row()])
    assert time.monotonic() - begun < 2


def test_cosine_follows_the_papers_curve() -> None:
    """From arXiv 2502.03373: half way it is the mean of both ends; r_0 at no length, r_L just before the limit."""
    reward = made("cosine", max_tokens=100, correct=[2.0, 1.0], wrong=[-10.0, 0.0], exceeded=-10.0)
    reward.accuracy = lambda completions, rows: [1.0, 1.0, 0.0, 0.0, 0.0, 1.0, None]
    found = reward([tokens(n) for n in (0, 50, 0, 50, 99, 100, 5)], [row("1")] * 7)
    assert found[:4] == pytest.approx([2.0, 1.5, -10.0, -5.0])
    assert found[4] == pytest.approx(0.0, abs=0.01)
    assert found[5:] == [-10.0, None]
    assert reward.of(25, True) == pytest.approx(1.5 + 0.5 * 0.5**0.5)
    with pytest.raises(RequestError, match=r"reward\.cosine: set max_tokens"):
        made("cosine")


def test_soft_overlong_is_dapos_equation_13() -> None:
    reward = made("soft_overlong", max_tokens=100, cache=20)
    assert reward([tokens(n) for n in (0, 80, 85, 90, 100, 200)], [row()] * 6) == pytest.approx([0, 0, -0.25, -0.5, -1, -1])
    with pytest.raises(ValueError, match="cache must be at most max_tokens, 10, not 20"):
        OverlongConfig(10, 20)


def test_length_and_its_units() -> None:
    reward = made("length", min=10, max=20, slack=10)
    assert reward([tokens(n) for n in (10, 20, 5, 25, 0, 40)], [row()] * 6) == [1, 1, 0.5, 0.5, 0, 0]
    assert made("length", max=2, unit="words")(["a b", "a b c"], [row()] * 2) == [1, 0]
    assert made("length", max=2, unit="characters")(["ab", Answer("ab", raw="abc")], [row()] * 2) == [1, 0]
    with pytest.raises(RequestError, match="came as text alone"):
        reward(["text"], [row()])


def test_repetition_is_the_share_of_ngrams_that_stood_before() -> None:
    reward = made("repetition", n=2)
    assert reward(["a b c d", "a b a b a", "a", ""], [row()] * 4) == [0, -0.5, 0, 0]  # ab ba ab ba: two of four
    assert made("repetition", n=1, penalty=-2.0, unit="tokens")([tokens(4)], [row()]) == [-1.5]


# --- tool calls -------------------------------------------------------------------------------------------------------


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def calls(*made: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": list(made)}], **more}


MARKED = '<tool_call>\n{"name": "f", "arguments": {"a": 1, "b": "x"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("said", "asked", "share", "whole"),
    [
        (MARKED, calls(call("f", a=1, b="x")), 1, 1),
        (MARKED, calls(call("f", a=2, b="x")), 0.75, 0),
        (MARKED, calls(call("g", a=1)), 0, 0),
        (MARKED, calls(call("f", a=1, b="x"), call("g")), 0.5, 0),
        (MARKED + MARKED, calls(call("f", a=1, b="x")), 0.5, 0),
        ('{"name": "g", "arguments": "{}"}', calls(call("g")), 1, 1),
        ("no call", calls(call("g")), 0, 0),
        ("no call", {**row("no"), "tools": [{"name": "f"}]}, 1, 1),
        (MARKED, {**row("no"), "tools": [{"name": "f"}]}, 0, 0),
        ("no call", row("no"), None, None),
        (Answer("", message={"tool_calls": [call("f", a=True)]}), calls(call("f", a=1)), 0.5, 0),
        (Answer("", message={"tool_calls": [call("g"), call("f", a=1)]}), calls(call("f", a=1), call("g")), 1, 1),
        (Answer("", message={"tool_calls": [call("f", a=2), call("f", a=1)]}), calls(call("f", a=1), call("f", a=3)), 0.75, 0),
    ],
)
def test_tool_calls(said: str, asked: dict[str, Any], share: float | None, whole: float | None) -> None:
    assert made("tool_call")([said], [asked]) == [share]
    assert made("tool_call", partial=False)([said], [asked]) == [whole]


def test_calls_that_cannot_be_read_are_told() -> None:
    with pytest.raises(ValueError, match="not a call, with a name and arguments: 3"):
        made("tool_call", calls="right")([""], [row(right=[3])])
    with pytest.raises(ValueError, match="the row's 'right' is no JSON"):
        made("tool_call", calls="right")([""], [row(right="{")])


class Reads:
    """A template whose reader finds one call."""

    def reader(self, prompt: list[int], tools: Any) -> Any:
        from swift_core.types import AnswerDelta

        class Reader:
            def feed(self, ids: Any) -> list[AnswerDelta]:
                return [AnswerDelta(reasoning="hm"), AnswerDelta(call=0, name="f", arguments='{"a": 1}')]

            def close(self) -> list[AnswerDelta]:
                return []

        return Reader()


def test_an_answer_is_read_by_the_template() -> None:
    answer = answer_of(Completion(0, "<think>hm</think> call", [1, 2], finish="stop"), Reads())
    assert (str(answer), answer.raw, answer.finish) == ("", "<think>hm</think> call", "stop")
    assert made("tool_call")([answer], [calls(call("f", a=1))]) == [1]
    assert str(answer_of(Completion(0, "plain", [1]))) == "plain"
