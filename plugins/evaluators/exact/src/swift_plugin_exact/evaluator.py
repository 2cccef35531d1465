"""The evaluator `exact`: one greedy answer for each row, scored against the row's reference; perplexity of the trained tokens.

Every row is accounted for: it has a score, or a reason why it has none, in `EvalReport.rows` and in `EvalReport.counts`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from swift_core.errors import RequestError, RunError
from swift_core.source import grounded
from swift_core.types import Completion, EvalReport, EvalRun, Record, Request, Sample

from swift_plugin_exact.answers import Unusable, extract_answer, read_row
from swift_plugin_exact.config import ExactConfig
from swift_plugin_exact.metrics import Score, make_metrics

CHUNK = 32  # sequences given to `Engine.logprobs` at once, so that the progress bar moves


@dataclass
class Result:
    """What became of one row. `reasons` says, for "answer" and "perplexity", why there is no score."""

    number: int
    record: Record
    prediction: str | None = None
    references: list[str] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    loss: float = 0.0  # minus the sum of log-probabilities
    tokens: int = 0

    def row(self) -> dict[str, Any]:
        reference = self.references[0] if len(self.references) == 1 else self.references or None
        row = {"row": self.number, "where": self.record.where, "prediction": self.prediction, "reference": reference}
        return {**row, "scores": self.scores, **({"not_scored": self.reasons} if self.reasons else {})}


class ExactEvaluator:
    """Satisfies `swift_core.types.Evaluator`."""

    def __init__(self, config: ExactConfig) -> None:
        self.config = config
        self._pattern = re.compile(config.extract) if config.extract else None

    def evaluate(self, run: EvalRun) -> EvalReport:
        """Score the records of a run. Raises RequestError when no row can be scored."""
        metrics = make_metrics(self.config.metrics, self.config.normalise, run.part)  # an unknown name ends here
        records = [grounded(record, run.template) for record in run.records[: self.config.limit]]
        results = [Result(number, record) for number, record in enumerate(records)]
        counts = Counter({"rows": len(results)})
        if len(run.records) > len(records):
            counts["beyond limit"] = len(run.records) - len(records)
        if metrics:
            self._score_answers(run, results, metrics, counts)
        if "perplexity" in self.config.metrics:
            self._score_tokens(run, results, counts)
        figures = _figures(self.config.metrics, results)
        _account(results, counts)
        if not counts["scored"]:
            raise RequestError(f"no row can be scored: {_worst(results) or 'there is no row'}")
        lost = [name for name in self.config.metrics if name not in figures]
        if counts["refused"] or lost:
            none = f"; none has {', '.join(lost)}" if lost else ""
            run.events.warn(f"{counts['refused']} of {len(results)} rows are not scored{none}: {_worst(results)}")
        shown = {name: count for name, count in counts.items() if count or name in ("rows", "scored", "refused")}
        return EvalReport(figures, [result.row() for result in results], shown)

    def _score_answers(self, run: EvalRun, results: list[Result], metrics: dict[str, Score], counts: Counter[str]) -> None:
        """Generate all answers, and score each; an answer in which `extract` finds nothing scores 0."""
        asked: list[tuple[Result, Request, list[str]]] = []
        for result in results:
            try:
                request, result.references = _request(result.record, self.config.max_tokens)
                _check_media(run, request.media)
                answers = [extract_answer(self._pattern, text) for text in result.references]
                wanted = [answer for answer in answers if answer is not None]
                if not wanted:
                    raise Unusable("extract matches nothing in the reference")
                asked.append((result, request, wanted))
            except Unusable as err:
                result.reasons["answer"] = str(err)
        answers = _generate(run, [request for _, request, _ in asked])
        for (result, _, wanted), completion in zip(asked, answers, strict=True):
            if isinstance(completion, str):
                result.reasons["answer"] = completion
                continue
            result.prediction = completion.text
            answer = extract_answer(self._pattern, completion.text)
            counts["answers cut at max_tokens"] += completion.finish == "length"
            counts["answers without a match of extract"] += answer is None
            for name, score in metrics.items():
                result.scores[name] = 0.0 if answer is None else max(float(score(answer, text)) for text in wanted)

    def _score_tokens(self, run: EvalRun, results: list[Result], counts: Counter[str]) -> None:
        """Sum the log-probabilities of each row's trained tokens, as the template marks them."""
        encoded: list[tuple[Result, Sample]] = []
        for result in results:
            try:
                encoded += [(result, sample) for sample in _encode(run, result.record)]
            except Unusable as err:
                result.reasons["perplexity"] = str(err)
        starts = range(0, len(encoded), CHUNK)
        for start in run.events.track(starts, "perplexity", total=len(starts)):
            chunk = encoded[start : start + CHUNK]
            samples = [sample for _, sample in chunk]
            given = {"samples": samples} if any(sample.media or sample.label for sample in samples) else {}
            values = run.engine.logprobs([sample.input_ids for sample in samples], **given)
            for (result, sample), row in zip(chunk, values, strict=True):
                trained = _trained(sample, row)
                result.loss -= math.fsum(trained)
                result.tokens += len(trained)
        for result in results:
            if result.tokens:
                result.scores["perplexity"] = perplexity(result.loss, result.tokens)
            else:
                result.reasons.setdefault("perplexity", "no trained token has a token before it")
        counts["trained tokens"] = sum(result.tokens for result in results)


def perplexity(loss: float, tokens: int) -> float:
    """exp(loss / tokens), with `loss` the negative sum of the tokens' natural log-probabilities; inf where it overflows."""
    mean = loss / tokens
    return math.exp(mean) if not mean > 709 else math.inf


def _request(record: Record, max_tokens: int) -> tuple[Request, list[str]]:
    if record.refused:
        raise Unusable(record.refused)
    return read_row(record.row, max_tokens)


def _encode(run: EvalRun, record: Record) -> list[Sample]:
    if record.refused:
        raise Unusable(record.refused)
    try:
        samples = run.template.encode(record.row)
    except (ValueError, RequestError) as err:
        raise Unusable(str(err)) from None
    for sample in samples:
        _check_media(run, sample.media)
    return samples


def _check_media(run: EvalRun, media: dict[str, list[Any]]) -> None:
    if media and "media" not in run.engine.capabilities:
        raise Unusable(f"the row has {', '.join(media)}, which this engine does not take with this model")


def _generate(run: EvalRun, requests: list[Request]) -> list[Completion | str]:
    """The completions in the order of their requests, or the reason why there is none. Raises RunError where the engine left
    one out."""
    found: dict[int, Completion | str] = {}
    if requests:
        for number, completion in run.events.track(_answered(run, requests), "answers", total=len(requests)):
            found[number] = completion
    lacking = [number for number in range(len(requests)) if number not in found]
    if lacking:
        raise RunError(f"the engine returned {len(found)} of {len(requests)} completions; it left out request {lacking[0]}")
    return [found[number] for number in range(len(requests))]


def _answered(run: EvalRun, requests: list[Request]) -> Iterator[tuple[int, Completion | str]]:
    """Completions as they come. Requests with media, which a broken file may fail, go in chunks, and one by one where a chunk
    fails; without media a request that fails is the run's fault, and ends it."""
    plain = [number for number, request in enumerate(requests) if not request.media]
    if plain:
        for completion in run.engine.generate([requests[number] for number in plain]):
            yield plain[completion.index], completion
    shown = [number for number, request in enumerate(requests) if request.media]
    for start in range(0, len(shown), CHUNK):
        numbers = shown[start : start + CHUNK]
        try:
            made = list(run.engine.generate([requests[number] for number in numbers]))
        except (ValueError, RequestError):
            for number in numbers:
                try:
                    for completion in run.engine.generate([requests[number]]):
                        yield number, completion
                except (ValueError, RequestError) as err:
                    yield number, str(err)
        else:
            yield from ((numbers[completion.index], completion) for completion in made)


def _trained(sample: Sample, values: Sequence[float]) -> list[float]:
    """The log-probabilities of a sample's trained tokens; `values[i]` belongs to token i + 1, and token 0 has none."""
    if len(values) != len(sample.input_ids) - 1:
        count = len(sample.input_ids)
        raise RunError(f"the engine returned {len(values)} log-probabilities for {count} tokens; it must be one less")
    return [value for value, weight in zip(values, sample.weights[1:], strict=True) if weight > 0]


def _figures(names: list[str], results: list[Result]) -> dict[str, float]:
    """The mean over rows of each text metric; perplexity over all tokens. A metric that no row has is left out."""
    figures: dict[str, float] = {}
    for name in names:
        scored = [result for result in results if name in result.scores]
        if not scored:
            continue
        if name == "perplexity":
            figures[name] = perplexity(math.fsum(r.loss for r in scored), sum(r.tokens for r in scored))
        else:
            figures[name] = math.fsum(result.scores[name] for result in scored) / len(scored)
    return figures


def _account(results: list[Result], counts: Counter[str]) -> None:
    """Count the rows with and without scores, and each reason."""
    for result in results:
        counts["scored" if result.scores else "refused"] += 1
        if not result.scores:
            counts["refused: " + "; ".join(dict.fromkeys(result.reasons.values()))] += 1
        else:
            for what, reason in result.reasons.items():
                counts[f"no {what}: {reason}"] += 1
    counts["refused"] += 0  # both are always reported
    counts["scored"] += 0


def _worst(results: list[Result]) -> str:
    """The most frequent reasons, with the place of the first row of each."""
    reasons: dict[str, list[Result]] = {}
    for result in results:
        for reason in dict.fromkeys(result.reasons.values()):
            reasons.setdefault(reason, []).append(result)
    often = sorted(reasons.items(), key=lambda item: -len(item[1]))[:3]
    return "; ".join(f"{len(rows)} rows: {reason} ({rows[0].record.where})" for reason, rows in often)
