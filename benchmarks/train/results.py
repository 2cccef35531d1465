"""From what was measured to the table: pure functions.

A rate is tokens divided by the seconds from the beginning of the first step to the end of the last, as they show in the
log from outside. Of several rounds the median is taken, each column by itself.
"""

from __future__ import annotations

import operator
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.train.measure import Measured
from benchmarks.train.tools import Tool

MIB = 2**20


@dataclass(frozen=True)
class Counts:
    """What a tool trains of the rows: tokens with prompts, trained tokens, and rows that differ from the reference."""

    rows: int
    tokens: int
    trained: int
    differing: int
    difference: str


@dataclass(frozen=True)
class Result:
    """One run of one tool. Seconds count from the command's start."""

    tool: str
    round: int
    status: int
    steps: int
    begin: float
    first_step: float
    last_step: float
    seconds: float
    processor_seconds: float
    peak_bytes: int
    train_loss: float
    held_loss: float | None = None

    @property
    def training(self) -> float:
        return self.last_step - self.begin


def result(tool: Tool, number: int, measured: Measured) -> Result:
    """The figures of one run. Raises ValueError where its log shows no step."""
    begin = 0.0
    ends: list[float] = []
    losses: list[float] = []
    for line in measured.lines:
        if not ends and tool.begins(line.text):
            begin = line.seconds
        if step := tool.step(line.text, len(ends) + 1):
            ends.append(line.seconds)
            losses.append(step.loss)
    if not ends:
        last = measured.lines[-1].text.strip() if measured.lines else "nothing"
        raise ValueError(f"{tool.name}: no step in its log (exit status {measured.status}; last line: {last})")
    return Result(
        tool.name, number, measured.status, len(ends), begin, ends[0], ends[-1], measured.seconds,
        measured.processor_seconds, measured.peak_bytes, statistics.fmean(losses),
    )  # fmt: skip


def compare(reference: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> Counts:
    """How the rows that a tool trains differ from the reference, whatever their order. Each has `ids` and `labels`."""
    wanted = {tuple(row["ids"]): tuple(row["labels"]) for row in reference}
    missing = other = more = less = 0
    for row in found:
        labels = wanted.get(tuple(row["ids"]))
        if labels is None:
            missing += 1
        elif labels != tuple(row["labels"]):
            other += 1
            more += sum(mine != -100 and theirs == -100 for mine, theirs in zip(row["labels"], labels, strict=True))
            less += sum(mine == -100 and theirs != -100 for mine, theirs in zip(row["labels"], labels, strict=True))
    said = []
    if len(found) != len(reference):
        said.append(f"{len(found)} rows instead of {len(reference)}")
    if missing:
        said.append(f"{missing} rows with other tokens")
    if other:
        said.append(f"{other} rows train {more} tokens more and {less} fewer")
    tokens = sum(len(row["ids"]) for row in found)
    trained = sum(label != -100 for row in found for label in row["labels"])
    return Counts(len(found), tokens, trained, missing + other, "; ".join(said) or "the same")


def median(results: Iterable[Result], value: Callable[[Result], float | None]) -> float | None:
    found = [one for one in map(value, results) if one is not None]
    return statistics.median(found) if found else None


def summary(
    results: Sequence[Result], counts: Mapping[str, Counts], batch: int, flops: float | None = None
) -> list[dict[str, Any]]:
    """A mapping for each tool, in the order in which the tools ran first.

    batch: rows of a step; of a run that was stopped early, tokens are taken in proportion. flops: of the whole job.
    """
    rows = []
    for name in dict.fromkeys(one.tool for one in results):
        mine = [one for one in results if one.tool == name and one.status == 0]
        share = counts[name]
        training = median(mine, lambda one: one.training)
        part = min(1.0, (median(mine, lambda one: one.steps) or 0) * batch / share.rows)
        row = {"tool": name, "runs": len(mine), "trained_tokens": share.trained, "tokens": share.tokens, "training": training}
        row["trained_per_second"] = part * share.trained / training if training else None
        row["tokens_per_second"] = part * share.tokens / training if training else None
        row["gflops_per_second"] = part * flops / training / 1e9 if flops and training else None
        row["difference"] = share.difference
        for key in ("seconds", "begin", "first_step", "peak_bytes", "processor_seconds", "held_loss", "train_loss"):
            row[key] = median(mine, operator.attrgetter(key))
        rows.append(row)
    return rows


COLUMNS: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("trained tokens/s", lambda row: row["trained_per_second"], ".1f"),
    ("tokens/s, prompts too", lambda row: row["tokens_per_second"], ".1f"),
    ("wall s", lambda row: row["seconds"], ".1f"),
    ("first step begins, s", lambda row: row["begin"], ".1f"),
    ("first step done, s", lambda row: row["first_step"], ".1f"),
    ("peak MiB", lambda row: row["peak_bytes"] and row["peak_bytes"] / MIB, ".0f"),
    ("held-out loss", lambda row: row["held_loss"], ".4f"),
    ("trained tokens", lambda row: row["trained_tokens"], ",d"),
    ("GFLOP/s", lambda row: row["gflops_per_second"], ".0f"),
]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The summary as a Markdown table."""
    lines = [["tool", *(title for title, _, _ in COLUMNS)], ["---", *("---:" for _ in COLUMNS)]]
    lines += [[row["tool"], *(_cell(value(row), form) for _, value, form in COLUMNS)] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def ratios(rows: Sequence[dict[str, Any]], ours: str = "swift-core") -> list[str]:
    """How `ours` stands to each other tool, a line each."""
    mine = next((row for row in rows if row["tool"] == ours), None)
    said = []
    for row in rows:
        if mine is None or row is mine or not (mine["runs"] and row["runs"]):
            continue
        over = {key: mine[key] / row[key] for key in ("trained_per_second", "seconds", "peak_bytes")}
        loss = f", held-out loss {mine['held_loss'] - row['held_loss']:+.4f}" if mine["held_loss"] and row["held_loss"] else ""
        said.append(
            f"{ours} to {row['tool']}: {over['trained_per_second']:.2f} x trained tokens/s, {over['seconds']:.0%} of the wall "
            f"time, {over['peak_bytes']:.0%} of the peak memory{loss}"
        )
    return said


def as_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    return [asdict(one) for one in results]
