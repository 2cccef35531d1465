"""The evaluator with an engine whose answers are known, and perplexity against torch's cross entropy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from swift_core.config import build_options
from swift_core.errors import RequestError, RunError
from swift_core.events import Event, EventSink
from swift_core.testing import EvaluatorContract
from swift_core.types import Completion, EvalReport, EvalRun, Record, Request, Sample
from swift_plugin_exact.config import ExactConfig
from swift_plugin_exact.evaluator import CHUNK, ExactEvaluator


class CannedEngine:
    """Answers from a table by the last message, last request first; a token's log-probability is -(its id) / 10."""

    capabilities: frozenset[str] = frozenset()

    def __init__(self, answers: dict[str, str] | None = None) -> None:
        self.answers, self.calls = answers or {}, 0
        self.requests: list[Request] = []

    def generate(self, requests: Sequence[Request], stream: bool = False) -> Iterator[Completion]:
        self.calls += 1
        self.requests = list(requests)
        for index in reversed(range(len(requests))):
            question = (requests[index].messages or [])[-1]["content"]
            if question != "lose me":
                yield Completion(index, self.answers[question], finish="length" if question == "long" else "stop")

    def logprobs(self, sequences: Sequence[Sequence[int]], adapter: str | None = None) -> list[list[float]]:
        return [[-token / 10 for token in ids[1:]] for ids in sequences]


class CountTemplate:
    """Token ids are stored in the row; weights too."""

    def encode(self, row: dict[str, Any]) -> list[Sample]:
        if "ids" not in row:
            raise ValueError("no ids")
        return [Sample(ids, weights) for ids, weights in zip(row["ids"], row["weights"], strict=True)]


class TestExact(EvaluatorContract):
    distribution, id = "swift-plugin-exact", "exact"

    @pytest.fixture
    def run(self, tiny_bundle: Any) -> EvalRun:
        """As the contract's, with a template that can encode: perplexity is among the default metrics."""
        engine: Any = CannedEngine({row["messages"][-2]["content"]: "A test." for row in self.rows})
        records = [Record(row, f"row {number}") for number, row in enumerate(self.rows)]
        return EvalRun(engine, records, tiny_bundle.template, EventSink(), lambda kind, ident: None)


def ask(question: str, answer: str | None = None, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"messages": messages + ([{"role": "assistant", "content": answer}] if answer is not None else []), **fields}


def evaluate(
    rows: list[Any], engine: CannedEngine, events: EventSink | None = None, template: Any = None, **options: Any
) -> EvalReport:
    config = build_options(ExactConfig, options, "evaluator.exact")
    records = [row if isinstance(row, Record) else Record(row, f"test.jsonl:{n + 1}") for n, row in enumerate(rows)]

    def part(kind: str, name: str) -> Any:
        return lambda prediction, reference: len(prediction) / 10

    run = EvalRun(engine, records, template or CountTemplate(), events or EventSink(), part)  # type: ignore[arg-type]
    return ExactEvaluator(config).evaluate(run)


def test_answers_meet_their_own_references() -> None:
    engine = CannedEngine({"capital?": "The Paris.", "two?": "2 cats", "which?": "b"})
    rows = [ask("capital?", "Paris"), ask("two?", "2 dogs"), ask("which?", label=["c", "B"])]
    report = evaluate(rows, engine, metrics=["exact_match", "token_f1", "accuracy", "shout"])
    assert engine.calls == 1  # all requests at once
    assert report.metrics == pytest.approx(
        {"exact_match": 2 / 3, "token_f1": (1 + 0.5 + 1) / 3, "accuracy": 1 / 3, "shout": (1 + 0.6 + 0.1) / 3}
    )
    assert report.rows[1] == {
        "row": 1, "where": "test.jsonl:2", "prediction": "2 cats", "reference": "2 dogs",
        "scores": {"exact_match": 0.0, "token_f1": 0.5, "accuracy": 0.0, "shout": 0.6},
    }  # fmt: skip
    assert report.rows[2]["reference"] == ["c", "B"]
    assert (report.counts["rows"], report.counts["scored"], report.counts["refused"]) == (3, 3, 0)


def test_requests_are_greedy_and_whole() -> None:
    engine = CannedEngine({"q": "x", "long": "y"})
    history = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "one", "train": False, "weight": 0.5},
    ]
    row = ask("q", "x", tools=[{"name": "t"}], chat_template_kwargs={"enable_thinking": False})
    row["messages"] = history + row["messages"]
    report = evaluate([row, ask("long", solution=7)], engine, metrics=["exact_match"], max_tokens=9)
    first, second = engine.requests
    assert [message["content"] for message in first.messages or []] == ["s", "first", "one", "q"]
    assert (first.messages or [])[2] == {"role": "assistant", "content": "one"}
    assert first.tools == [{"name": "t"}]
    assert first.template_kwargs == {"enable_thinking": False}
    assert (first.max_tokens, first.temperature) == (9, 0.0)
    assert len(second.messages or []) == 1
    assert report.rows[1]["reference"] == "7"
    assert report.counts["answers cut at max_tokens"] == 1


def test_extract_takes_the_last_answer() -> None:
    engine = CannedEngine({"a": "2+2 #### 5, no #### 4", "b": "it is 4", "c": "#### 3.50"})
    rows = [ask("a", "so #### 4"), ask("b", "#### 4"), ask("c", "#### 3.5"), ask("d", "four")]
    report = evaluate(rows, engine, metrics=["accuracy"], extract=r"####\s*(-?\d+(\.\d+)?)")
    assert [row["scores"].get("accuracy") for row in report.rows] == [1.0, 0.0, 1.0, None]
    assert report.metrics["accuracy"] == pytest.approx(2 / 3)
    assert report.counts["answers without a match of extract"] == 1
    assert report.counts["refused: extract matches nothing in the reference"] == 1


def test_extract_skips_empty_matches() -> None:
    engine = CannedEngine({"a": "<think>one</think>\nyes"})
    report = evaluate([ask("a", "yes")], engine, metrics=["exact_match"], extract=r"(?s)(?:.*</think>)?\s*(.*)")
    assert report.metrics["exact_match"] == 1


def test_every_row_is_accounted_for() -> None:
    lines: list[Event] = []
    events = EventSink()
    events.add(lines.append)
    engine = CannedEngine({"q": "x"})
    call = {"role": "assistant", "content": None, "tool_calls": [{}]}
    rows = [
        ask("q", "x"),
        ask("q"),
        ask("q", " "),
        {"messages": [{"role": "user", "content": "q"}, call]},
        {"messages": [{"role": "assistant", "content": "x"}]},
        ask("q", "x", images=["a.png"]),
        ask("q", label={"no": 1}),
        Record({}, "test.jsonl:8", refused="not JSON"),
        ask("q", "x"),
    ]
    report = evaluate(rows, engine, events, metrics=["exact_match"], limit=8)
    assert (report.counts["rows"], report.counts["scored"], report.counts["refused"]) == (8, 1, 7)
    assert report.counts["beyond limit"] == 1
    reasons = {key: count for key, count in report.counts.items() if key.startswith("refused: ")}
    assert sum(reasons.values()) == 7 == len(reasons)
    assert reasons["refused: not JSON"] == 1
    assert len(report.rows) == 8
    (warning,) = [event.data["text"] for event in lines if event.kind == "warning"]
    assert warning.startswith("7 of 8 rows are not scored")
    assert any(event.kind == "progress" and event.data["task"] == "answers" for event in lines)


class SeeingEngine(CannedEngine):
    """Answers with the names of the media it is shown; a file named broken fails the whole call, as a decoder's error does."""

    capabilities = frozenset({"media"})

    def generate(self, requests: Sequence[Request], stream: bool = False) -> Iterator[Completion]:
        self.calls += 1
        if any("broken.png" in request.media.get("images", ()) for request in requests):
            raise ValueError("image broken.png cannot be read")
        for index, request in enumerate(requests):
            yield Completion(index, " ".join(request.media.get("images", ["nothing"])), finish="stop")

    def logprobs(
        self, sequences: Sequence[Sequence[int]], adapter: str | None = None, *, samples: Sequence[Sample] = ()
    ) -> list[list[float]]:
        shown = [len(sample.media.get("images", ())) for sample in samples] or [0] * len(sequences)
        return [[-count] * (len(ids) - 1) for ids, count in zip(sequences, shown, strict=True)]


def test_rows_with_media_are_asked_with_them() -> None:
    part = {"type": "image"}
    two = ask("q", images=["a.png", "b.png"])
    two["messages"] = [
        {"role": "user", "content": [part]},
        {"role": "assistant", "content": [part, {"type": "text", "text": "a.png"}]},
    ]
    rows = [ask("q", "nothing"), ask("q", "a.png", images=["a.png"]), ask("q", "x", images=["broken.png"]), two]
    report = evaluate(rows, SeeingEngine(), metrics=["exact_match"])
    assert [row["prediction"] for row in report.rows] == ["nothing", "a.png", None, "a.png"]
    assert report.metrics["exact_match"] == 1.0
    assert report.rows[2]["not_scored"] == {"answer": "image broken.png cannot be read"}
    assert (report.counts["scored"], report.counts["refused"]) == (3, 1)
    blind = evaluate([ask("q", "x", images=["a.png"]), ask("q", "x")], CannedEngine({"q": "x"}), metrics=["exact_match"])
    assert blind.rows[0]["not_scored"] == {"answer": "the row has images, which this engine does not take with this model"}


def test_perplexity_sees_the_media_of_its_samples() -> None:
    class Template(CountTemplate):
        def encode(self, row: dict[str, Any]) -> list[Sample]:
            return [Sample([1, 2, 3], [0.0, 1.0, 1.0], media={"images": row["images"]} if row.get("images") else {})]

    events = EventSink()
    records = [Record(ask("q", "x", images=images), "r") for images in (["a", "b"], [])]
    run = EvalRun(SeeingEngine(), records, Template(), events, lambda kind, ident: None)  # type: ignore[arg-type]
    report = ExactEvaluator(build_options(ExactConfig, {"metrics": ["perplexity"]}, "evaluator")).evaluate(run)
    assert report.metrics["perplexity"] == pytest.approx(math.exp((2 + 2 + 0 + 0) / 4))


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(RequestError, match=r"no row can be scored: 2 rows: no reference.*test.jsonl:1"):
        evaluate([ask("q"), ask("q")], CannedEngine(), metrics=["exact_match"])
    with pytest.raises(RequestError, match="there is no row"):
        evaluate([], CannedEngine())


def test_a_lost_completion_is_an_error() -> None:
    with pytest.raises(RunError, match="1 of 2"):
        evaluate([ask("q", "x"), ask("lose me", "y")], CannedEngine({"q": "x"}), metrics=["exact_match"])


def test_perplexity_weighs_tokens_over_all_rows() -> None:
    engine = CannedEngine()
    rows: list[Any] = [
        {"ids": [[9, 1, 2, 3]], "weights": [[1.0, 0.0, 0.5, 1.0]]},  # trained: 2 and 3; token 0 has nothing before it
        {"ids": [[5, 6], [7, 8]], "weights": [[0.0, 1.0], [0.0, 1.0]]},  # two samples of one row
        {"ids": [[4]], "weights": [[1.0]]},
        {},
    ]
    report = evaluate(rows, engine, metrics=["perplexity"])
    assert engine.calls == 0  # nothing is generated
    assert report.metrics == {"perplexity": pytest.approx(math.exp((0.2 + 0.3 + 0.6 + 0.8) / 4))}
    assert report.rows[0]["scores"]["perplexity"] == pytest.approx(math.exp(0.25))
    assert report.rows[1]["scores"]["perplexity"] == pytest.approx(math.exp(0.7))
    assert report.counts["trained tokens"] == 4
    assert report.counts["refused: no ids"] == 1
    assert report.counts["refused: no trained token has a token before it"] == 1


def test_rows_beyond_one_chunk_all_count() -> None:
    rows: list[Any] = [{"ids": [[0, n]], "weights": [[0.0, 1.0]]} for n in range(CHUNK + 3)]
    report = evaluate(rows, CannedEngine(), metrics=["perplexity"])
    assert report.metrics["perplexity"] == pytest.approx(math.exp((CHUNK + 2) / 20))
    assert report.counts["scored"] == CHUNK + 3


def test_a_row_may_have_one_score_and_not_the_other() -> None:
    report = evaluate([ask("q", "x")], CannedEngine({"q": "x"}), metrics=["exact_match", "perplexity"])
    assert report.metrics == {"exact_match": 1.0}
    assert report.rows[0]["not_scored"] == {"perplexity": "no ids"}
    assert report.counts["no perplexity: no ids"] == 1


def test_perplexity_agrees_with_cross_entropy(tiny_bundle: Any) -> None:
    import torch

    class TorchEngine(CannedEngine):
        def logprobs(self, sequences: Sequence[Sequence[int]], adapter: str | None = None) -> list[list[float]]:
            out = []
            for ids in sequences:
                tokens = torch.tensor([list(ids)])
                with torch.no_grad():
                    logits = tiny_bundle.model(input_ids=tokens).logits[0, :-1]
                out.append(logits.log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0].tolist())
            return out

    rows = [ask("Who are you?", "A test."), ask("Count.", "One, two, three, four, five."), ask("Hm", "No")]
    report = evaluate(rows, TorchEngine(), template=tiny_bundle.template, metrics=["perplexity"])

    batch = tiny_bundle.template.collate([sample for row in rows for sample in tiny_bundle.template.encode(row)])
    labels = torch.where(batch.weights > 0, batch.labels, -100)[:, 1:]
    with torch.no_grad():
        logits = tiny_bundle.model(**batch.inputs).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))
    assert report.metrics["perplexity"] == pytest.approx(math.exp(float(loss)), rel=1e-5)
    assert report.counts["trained tokens"] == batch.trained_tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": []}, "metrics is empty"),
        ({"metrics": ["accuracy", "accuracy"]}, "'accuracy' twice"),
        ({"extract": "("}, "extract is not a regular expression"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"normalize": True}, "Did you mean: normalise"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        build_options(ExactConfig, options, "evaluator.exact")
