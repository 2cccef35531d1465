"""`swift-core sample`: several answers to each row, scored, and the best, the worst, all or pairs of them kept."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
from swift_core.cli.common import ARGUMENTS, DATASET, JSON, MODEL, TRUST, config_of, options, print_json
from swift_core.errors import RequestError, RunError
from swift_core.events import console_events
from swift_core.session import Opened, Session
from swift_core.types import Record, Request, Row
from swift_plugin_rewards.answer import Answer
from swift_plugin_rewards.judge import read_prompt
from swift_plugin_rewards.make import FORMS, Rewards, make_rewards, score

from swift_plugin_use.answers import completions, message_from, request_of
from swift_plugin_use.begun import begin, finish
from swift_plugin_use.infer import model_of
from swift_plugin_use.options import ADAPTER, ENGINE, sampling, take_request
from swift_plugin_use.records import read_records

KEPT = ("tools", "images", "videos", "audios", "chat_template_kwargs")  # of a row, besides its messages
CHUNK = 8  # rows that are asked together


@click.command()
@options(ARGUMENTS, MODEL, ADAPTER, DATASET, click.option("--output", required=True, metavar="FILE", help="Rows, as jsonl."))
@options(
    click.option("--n", "count", type=click.IntRange(1), default=4, show_default=True, help="Answers to each row."),
    click.option("--reward", "rewards", multiple=True, metavar="R", help=f"What scores: {FORMS}."),
    click.option("--weight", "weights", multiple=True, type=float, metavar="W", help="Of each reward, in their order [1]."),
    click.option("--keep", type=click.Choice(["best", "worst", "all", "pairs"]), default="best", show_default=True,
                 help="Which answers; pairs: the best, and the worst as rejected."),
    click.option("--margin", type=click.FloatRange(0), default=0.0, show_default=True,
                 help="A pair's scores must differ by more than this."),
    click.option("--judge-prompt", metavar="FILE", help="What the judge is asked, with {question}, {reference}, {answer}."),
    click.option("--judge-model", metavar="NAME", help="The judge's name at its server [the only one there]."),
)  # fmt: skip
@options(sampling(temperature=1.0), ENGINE, TRUST, JSON)
def sample(
    arguments: tuple[str, ...], adapter: str | None, output: str, count: int, rewards: tuple[str, ...],
    weights: tuple[float, ...], keep: str, margin: float, judge_prompt: str | None, judge_model: str | None, as_json: bool,
    **flags: Any,
) -> None:  # fmt: skip
    """Answer each row several times, score the answers, and keep some as rows to train on. The same call again goes on."""
    request = take_request(flags)
    if keep != "all" and not rewards:
        raise RequestError(f"--keep {keep} needs a --reward: {FORMS}")
    if weights and len(weights) != len(rewards):
        raise RequestError(f"--weight: {len(weights)} for {len(rewards)} rewards; give one for each, in their order")
    if len(set(rewards)) < len(rewards):
        raise RequestError("--reward: the same one is given twice; use --weight")
    if keep == "pairs" and count < 2:
        raise RequestError("--keep pairs needs --n 2 or more")
    if margin and keep != "pairs":
        raise RequestError(f"--margin is between the two of a pair: it needs --keep pairs, not {keep}")
    for option, given in (("--judge-prompt", judge_prompt), ("--judge-model", judge_model)):
        if given is not None and not any(spec.startswith("judge:") for spec in rewards):
            raise RequestError(f"{option} needs a judge: --reward judge:http://HOST:PORT/v1")
    if count > 1 and not request.temperature:
        raise RequestError(f"--temperature 0 gives the same answer {count} times; give another, or --n 1")
    specs = [reward_of(spec, judge_prompt, judge_model) for spec in rewards]
    config = config_of(arguments, needs_data=True, **flags)
    with ExitStack() as stack:
        session = stack.enter_context(Session(config, console_events()))
        made = make_rewards(session.part, specs, stack, config)
        if weights:
            made = [(name, weight, reward) for (name, _, reward), weight in zip(made, weights, strict=True)]
        opened = session.opened(adapter)
        if "predict" in opened.engine.capabilities:
            raise RequestError(f"model {opened.name} does not generate text: it has a head; use swift-core infer")
        records = read_records(session, opened.template)
        job = {"config": config.dump(), "model": model_of(session, adapter, opened), "request": asdict(request), "n": count}
        job |= {
            "rewards": [(spec, weight) for spec, (_, weight, _) in zip(rewards, made, strict=True)],
            "keep": [keep, margin],
            "judge": read_prompt(judge_prompt),
        }
        job["rows"] = [record.row for record in records]
        request = replace(request, seed=config.seed)
        asking = Sampling(opened, request, count, made, keep, margin)
        counts = write_file(asking, records, Path(output), job, session.events)
    if as_json:
        print_json({"output": output, **counts})
        return
    lost = [f"{counts[name]} {what}" for name, what in (("skipped", "skipped"), ("failed", "failed")) if counts[name]]
    where = f" (see {side_of(Path(output)).name})" if lost else ""
    click.echo(", ".join([f"{counts['kept']} rows kept of {counts['rows']}", *lost]) + f"{where}: {output}")


def reward_of(spec: str, judge_prompt: str | None, judge_model: str | None) -> Any:
    """`--reward` as `make_rewards` takes it, with what the other options say of a judge."""
    if not spec.startswith("judge:"):
        return spec
    given = {"prompt": judge_prompt, "model": judge_model}
    return {"name": spec, **{key: value for key, value in given.items() if value is not None}}


class Sampling:
    """How rows are answered and scored, and which answers are kept."""

    def __init__(self, opened: Opened, request: Request, count: int, rewards: Rewards, keep: str, margin: float) -> None:
        self.opened, self.request, self.count, self.rewards = opened, request, count, rewards
        self.keep, self.margin = keep, margin

    def rows(self, records: list[Record], first: int) -> Iterator[tuple[int, list[Row], dict[str, Any] | None]]:
        """For each record, numbered from `first` on: the rows that are kept, or why there is none."""
        asked: list[Request] = []
        faults: dict[int, str] = {}
        places: dict[int, int] = {}
        for number, record in enumerate(records, first):
            try:
                request, _ = request_of(record, self.request)
            except ValueError as err:
                faults[number] = str(err)
                continue
            places[number] = len(asked)
            seed = self.request.seed or 0  # each answer has its own, so that a file that goes on equals one in one go
            asked += [replace(request, seed=seed + number * self.count + n) for n in range(self.count)]
        found = completions(self.opened.engine, asked)
        for number, record in enumerate(records, first):
            if number in faults:
                yield number, [], {"error": faults[number]}
                continue
            at = places[number]
            yield (number, *self._kept(number, record, asked[at : at + self.count], found[at : at + self.count]))

    def _kept(
        self, number: int, record: Record, asked: list[Request], found: list[Any]
    ) -> tuple[list[Row], dict[str, Any] | None]:
        errors = [each for each in found if isinstance(each, str)]
        if errors:
            return [], {"error": errors[0]}
        answers = [message_from(each, request, self.opened.template) for each, request in zip(found, asked, strict=True)]
        try:
            said = [
                Answer(answer.get("content") or each.text, each.text, each.token_ids, each.finish, answer)
                for answer, each in zip(answers, found, strict=True)
            ]
            scores = score(self.rewards, said, [record.row] * len(said))
        except ValueError as err:
            return [], {"error": str(err)}
        base = {"row": number, "where": record.where, **{key: record.row[key] for key in KEPT if record.row.get(key)}}
        talk = list(asked[0].messages or [])
        order = sorted(range(len(found)), key=lambda n: -scores[n]["score"])  # of equals, the earlier first
        best, worst = order[0], order[-1]
        if self.keep == "pairs":
            gap = scores[best]["score"] - scores[worst]["score"]
            if gap <= self.margin or found[best].text == found[worst].text:
                return [], {"skipped": f"the scores differ by {gap:g}, not by more than {self.margin:g}"}
            row = base | {"messages": [*talk, answers[best]], "rejected": [*talk, answers[worst]]}
            return [row | {"scores": scores[best], "rejected_scores": scores[worst]}], None
        chosen = {"best": [best], "worst": [worst], "all": list(range(len(found)))}[self.keep]
        told = {"all": lambda n: {"choice": n}}.get(self.keep, lambda n: {})
        return [
            base | {"messages": [*talk, answers[n]], **told(n), "finish": found[n].finish}
            | ({"scores": scores[n]} if self.rewards else {})
            for n in chosen
        ], None  # fmt: skip


def side_of(output: Path) -> Path:
    """The file that says which rows have no answer, and why."""
    return output.with_name(output.name + ".lost")


def write_file(asking: Sampling, records: list[Record], output: Path, job: dict[str, Any], events: Any) -> dict[str, int]:
    """All rows' answers that are kept, in order. A killed call goes on with the chunk of the row that stands last in the file,
    which is answered again, the same way."""
    side = side_of(output)
    if not output.exists():
        side.unlink(missing_ok=True)
    begin(output, job)
    start = _certain(output, side)
    if start:
        events.note(f"{output}: going on with row {start}")
    lost: Counter[str] = Counter()
    with output.open("a", encoding="utf-8") as file, side.open("a", encoding="utf-8") as reasons:
        numbered = (
            item for first in range(start, len(records), CHUNK) for item in asking.rows(records[first : first + CHUNK], first)
        )
        for number, rows, why in events.track(numbered, "sampling", len(records) - start):
            if why is not None:
                reasons.write(json.dumps({"row": number, "where": records[number].where, **why}, ensure_ascii=False) + "\n")
                reasons.flush()
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            file.flush()
    for line in side.read_text(encoding="utf-8").splitlines():
        lost["failed" if "error" in json.loads(line) else "skipped"] += 1
    if not side.stat().st_size:
        side.unlink()
    finish(output)
    with output.open(encoding="utf-8") as file:
        kept = sum(1 for _ in file)
    if not kept and lost["failed"] == len(records):
        raise RunError(f"no row could be answered; {side} gives the reason for each")
    return {"kept": kept, "rows": len(records), "skipped": lost["skipped"], "failed": lost["failed"], "resumed": start}


def _certain(output: Path, side: Path) -> int:
    """The row to go on with: of the last one that either file tells of, the first of its chunk, so that the same rows are asked
    together as in one go, and rounding is alike. Lines from there on are taken out of both."""
    files = [file for file in (output, side) if file.exists()]
    held = {file: file.read_bytes().split(b"\n")[:-1] for file in files}
    numbers = {file: [json.loads(line)["row"] for line in lines] for file, lines in held.items()}
    start = max((found[-1] for found in numbers.values() if found), default=0) // CHUNK * CHUNK
    for file in files:
        kept = [line for line, number in zip(held[file], numbers[file], strict=True) if number < start]
        file.write_bytes(b"".join(line + b"\n" for line in kept))
    return int(start)
