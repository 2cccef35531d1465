"""The file of `infer`: one request a row, in order, one JSON object a line, scored where a metric is asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from swift_core import types
from swift_core.answers import message_of
from swift_core.errors import RequestError, RunError
from swift_core.events import EventSink
from swift_core.source import asked_media
from swift_core.types import Completion, Engine, Record, Request
from swift_plugin_rewards.asking import completions, split_reference

from swift_plugin_use.begun import begin, finish
from swift_plugin_use.predictions import predict_chunk

CHUNK = 32  # rows that are asked together
Rows = list[dict[str, Any]]


def named(media: dict[str, list[Any]]) -> dict[str, list[str]]:
    """How an answer's line names the media of its row: paths and addresses as they are, what the row holds by its size."""

    def name(item: Any) -> str:
        if isinstance(item, str) and not item.startswith("data:"):
            return item
        return f"<{len(item)} {'frames' if isinstance(item, list) else 'characters' if isinstance(item, str) else 'bytes'}>"

    return {key: [name(item) for item in items] for key, items in media.items()}


def request_of(record: Record, template: Request) -> tuple[Request, str | None]:
    """The request that a row makes, with `template`'s settings, and the row's own answer. Raises ValueError."""
    if record.refused:
        raise ValueError(record.refused)
    messages, reference = split_reference(record.row)
    if not messages:
        raise ValueError("the row has no message to answer: its only one is the answer")
    request = replace(
        template, messages=messages, tools=record.row.get("tools"), media=asked_media(record.row, len(messages)),
        template_kwargs=record.row.get("chat_template_kwargs", {}),
    )  # fmt: skip
    return request, reference


def answer_chunk(engine: Engine, records: list[Record], first: int, template: Request, writer: Any = None) -> Rows:
    """The answers of some records that stand together, from number `first` on. writer: the model's `Template`, or None."""
    if "predict" in getattr(engine, "capabilities", ()):  # a model that labels, embeds or scores
        return predict_chunk(engine, records, first)
    rows: Rows = [{"row": number, "where": record.where} for number, record in enumerate(records, first)]
    asked: list[tuple[dict[str, Any], Request]] = []
    for row, record in zip(rows, records, strict=True):
        try:
            request, reference = request_of(record, template)
        except ValueError as err:
            row["error"] = str(err)
            continue
        row["messages"] = request.messages
        row |= ({"reference": reference} if reference is not None else {}) | named(request.media)
        # Under sampling each row has a seed of its own, so that a resumed file equals an uninterrupted one.
        seed = None if template.seed is None or not template.temperature else template.seed + row["row"]
        asked.append((row, replace(request, seed=seed)))
    for index, found in enumerate(completions(engine, [request for _, request in asked])):
        row, request = asked[index]
        if isinstance(found, str):
            row["error"] = found
            continue
        row |= {"response": found.text, "finish": found.finish, "tokens": len(found.token_ids)}
        message = message_from(found, request, writer) if found.message or request.tools else {}
        row |= {key: message[key] for key in ("reasoning_content", "tool_calls") if message.get(key)}
    return rows


def message_from(found: Completion, request: Request, writer: Any) -> types.Row:
    """The answer as a message, tool calls and reasoning apart, as a server told it or as the template reads it."""
    if found.message is not None:
        return found.message
    if found.token_ids and hasattr(writer, "reader") and request.messages is not None and not request.stop:
        prompt = writer.prompt(request.messages, request.tools, **request.template_kwargs)
        reader = writer.reader(prompt, request.tools)
        return message_of([*reader.feed(found.token_ids), *reader.close()])
    return {"role": "assistant", "content": found.text}


def chunks_of(engine: Engine, records: list[Record], template: Request, starts: Iterable[int], writer: Any) -> Iterator[Rows]:
    for start in starts:
        yield answer_chunk(engine, records[start : start + CHUNK], start, template, writer)


def answer_file(
    chunks: Any,
    records: list[Record],
    output: Path,
    job: dict[str, Any],
    events: EventSink,
    metrics: Mapping[str, types.Metric] | None = None,
) -> dict[str, Any]:
    """Answer every record, in order, one JSON object a line. A killed call goes on where it stopped.

    chunks: from the numbers at which chunks start to the rows of each, in order. job: what the answers depend on; a file begun
    with another job is refused. Returns counts of rows answered, failed and resumed, and with metrics their means.
    """
    held = begin(output, job).split(b"\n")[:-1]
    done = len(held) // CHUNK * CHUNK  # whole chunks: the same rows are asked together as in one go, and rounding is alike
    if held[done:]:
        output.write_bytes(b"".join(line + b"\n" for line in held[:done]))
    counts: dict[str, Any] = {"answered": 0, "failed": 0, "resumed": done}
    if done:
        events.note(f"{output}: {done} rows are answered already, going on with row {done}")
    rows = (row for chunk in chunks(range(done, len(records), CHUNK)) for row in chunk)
    with output.open("a", encoding="utf-8") as file:
        for row in events.track(rows, "answering", len(records) - done):
            counts["failed" if "error" in row else "answered"] += 1
            if metrics and isinstance(row.get("reference"), str) and "response" in row:
                row["scores"] = {name: float(metric(row["response"], row["reference"])) for name, metric in metrics.items()}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
    finish(output)
    if counts["failed"] and not counts["answered"] and not done:
        raise RunError(f"no row could be answered; {output} gives the reason for each")
    return counts | (means(output, list(metrics)) if metrics else {})


def means(output: Path, names: list[str]) -> dict[str, Any]:
    """The mean of each metric over the rows that have a score, those of an earlier call too, and how many have none."""
    with output.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    scored = [row["scores"] for row in rows if "scores" in row]
    if not scored:
        raise RequestError(
            f"no row can be scored: none that was answered has an answer of its own to compare with; see {output}"
        )
    found = {name: math.fsum(scores[name] for scores in scored) / len(scored) for name in names}
    return {"metrics": found, "unscored": len(rows) - len(scored)}
