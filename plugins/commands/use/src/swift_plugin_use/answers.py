"""A resumable file of answers: one request a row, in order, one JSON object a line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from swift_core import types
from swift_core.errors import RequestError, RunError
from swift_core.events import EventSink
from swift_core.source import asked_media
from swift_core.types import Engine, Record, Request

from swift_plugin_use.predictions import predictions

CHUNK = 32  # rows between two writes of the answer file


def split_reference(row: types.Row) -> tuple[list[types.Row], str | None]:
    """The messages to answer, and the answer that the row already holds, if its last message is one."""
    messages = row["messages"]
    if messages and messages[-1]["role"] == "assistant":
        content = messages[-1].get("content")
        if isinstance(content, list) and all(part.get("type") == "text" for part in content):
            content = "".join(part["text"] for part in content)
        return messages[:-1], content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return messages, None


def named(media: dict[str, list[Any]]) -> dict[str, list[str]]:
    """How an answer's line names the media of its row: paths and addresses as they are, what the row holds by its size."""

    def name(item: Any) -> str:
        if isinstance(item, str) and not item.startswith("data:"):
            return item
        return f"<{len(item)} {'frames' if isinstance(item, list) else 'characters' if isinstance(item, str) else 'bytes'}>"

    return {key: [name(item) for item in items] for key, items in media.items()}


def answer_file(
    engine: Engine, records: list[Record], template: Request, output: Path, job: dict[str, Any], events: EventSink
) -> dict[str, int]:
    """Answer every record, in order, one JSON object a line. A killed call goes on where it stopped.

    template: the request whose settings every row's request takes. job: what the answers depend on; a file begun with
    another job is refused. Returns counts of rows answered and failed.
    """
    done = _begun(output, job)
    counts = {"answered": 0, "failed": 0, "resumed": done}
    mark = output.with_name(output.name + ".job")
    if not done:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(_fingerprint(job), encoding="utf-8")
        output.write_text("", encoding="utf-8")
    else:
        events.note(f"{output}: {done} rows are answered already, going on with row {done}")
    with output.open("a", encoding="utf-8") as file:
        heads = "predict" in getattr(engine, "capabilities", ())  # a model that labels, embeds or scores
        rows = predictions(engine, records, done) if heads else _answers(engine, records, template, done)
        for row in events.track(rows, "answering", len(records) - done):
            counts["failed" if "error" in row else "answered"] += 1
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
    mark.unlink()
    if counts["failed"] and not counts["answered"] and not done:
        raise RunError(f"no row could be answered; {output} gives the reason for each")
    return counts


def _answers(engine: Engine, records: list[Record], template: Request, done: int) -> Iterator[dict[str, Any]]:
    for start in range(done, len(records), CHUNK):
        rows: dict[int, dict[str, Any]] = {}
        requests: list[tuple[int, Request]] = []
        for number, record in enumerate(records[start : start + CHUNK], start):
            rows[number] = {"row": number, "where": record.where}
            if record.refused:
                rows[number]["error"] = record.refused
                continue
            messages, reference = split_reference(record.row)
            if not messages:
                rows[number]["error"] = "the row has no message to answer: its only one is the answer"
                continue
            rows[number] |= {"messages": messages} | ({"reference": reference} if reference is not None else {})
            media = asked_media(record.row, len(messages))
            rows[number] |= named(media)
            # Under sampling each row has a seed of its own, so that a resumed file equals an uninterrupted one.
            seed = None if template.seed is None or not template.temperature else template.seed + number
            kwargs = record.row.get("chat_template_kwargs", {})
            tools = record.row.get("tools")
            request = replace(template, messages=messages, tools=tools, seed=seed, template_kwargs=kwargs, media=media)
            requests.append((number, request))
        for completion in _generate(engine, requests, rows):
            number = requests[completion.index][0]
            rows[number] |= {"response": completion.text, "finish": completion.finish, "tokens": len(completion.token_ids)}
        yield from (rows[number] for number in sorted(rows))


def _generate(engine: Engine, requests: list[tuple[int, Request]], rows: dict[int, Any]) -> Iterator[types.Completion]:
    """All at once; where a row of the chunk fails, one by one, so that the others are answered."""
    try:
        yield from list(engine.generate([request for _, request in requests])) if requests else []
    except (ValueError, RequestError):
        for index, (number, request) in enumerate(requests):
            try:
                for completion in engine.generate([request]):
                    yield replace(completion, index=index)
            except (ValueError, RequestError) as err:
                rows[number]["error"] = str(err)


def _begun(output: Path, job: dict[str, Any]) -> int:
    """How many rows of this job the file holds already. A half-written last line is cut off."""
    mark = output.with_name(output.name + ".job")
    if not output.exists():
        return 0
    if not mark.exists():
        raise RequestError(f"output {output} exists and is finished; choose another --output, or remove it")
    if mark.read_text(encoding="utf-8") != _fingerprint(job):
        raise RequestError(f"output {output} was begun with another model, data set or settings; remove it, or choose another")
    whole = output.read_bytes()
    lines = whole[: whole.rfind(b"\n") + 1]
    if len(lines) != len(whole):
        output.write_bytes(lines)
    return lines.count(b"\n")


def _fingerprint(job: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(job, sort_keys=True, default=str).encode()).hexdigest()
