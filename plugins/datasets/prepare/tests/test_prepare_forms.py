"""Rows of a form: made by it with the template below, fitted part by part, and known to the key of the cache."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from swift_core.events import EventSink
from swift_core.parts import join, parts
from swift_core.types import Record, Sample
from swift_plugin_prepare.forms import Formed, content
from swift_plugin_prepare.prepare import prepare


class Letters:
    """A letter a token; the last two are trained."""

    def encode(self, row: dict[str, Any]) -> list[Sample]:
        said = row["text"]
        return [Sample([ord(c) for c in said], [0.0] * (len(said) - 2) + [1.0, 1.0], text=said)]

    def fingerprint(self) -> str:
        return "letters"


class Two:
    """A row's `text` and `other`."""

    def encode(self, template: Any, row: dict[str, Any]) -> list[Sample]:
        sides = [template.encode({"text": row[name]})[0] for name in ("text", "other")]
        return [join(sides, margin=row.get("margin", 0))]


def data(rows: list[dict[str, Any]], max_length: int | None, overflow: str) -> tuple[Any, Any]:
    trainer = SimpleNamespace(max_length=max_length, overflow=overflow)
    records = [Record(row, f"rows:{n + 1}") for n, row in enumerate(rows)]
    return prepare(records, [], Formed(Letters(), Two()), trainer, "stop", EventSink())  # type: ignore[arg-type]


ROWS = [{"text": "abcd", "other": "abxyz", "margin": 2}, {"text": "abcdefgh", "other": "ab"}, {"text": "mnop", "other": "mnoq"}]


def words(sample: Sample) -> list[str]:
    return ["".join(map(chr, part.input_ids)) for part in parts(sample)]


def test_parts_stay_together_in_the_store() -> None:
    found, account = data(ROWS, None, "drop")
    assert [words(sample) for sample in found.train] == [["abcd", "abxyz"], ["abcdefgh", "ab"], ["mnop", "mnoq"]]
    assert found.train[0].label["margin"] == 2
    assert (account.rows, account.samples, account.tokens, account.trained_tokens) == (3, 3, 27, 12)


def test_max_length_is_that_of_a_part() -> None:
    """The rows are longer as a whole; one has a part that is too long, and goes as one."""
    found, account = data(ROWS, 5, "drop")
    assert [words(sample) for sample in found.train] == [["abcd", "abxyz"], ["mnop", "mnoq"]]
    assert account.reasons == {"dropped": 1}
    found, account = data(ROWS, 5, "truncate-left")
    assert [words(sample) for sample in found.train] == [["abcd", "abxyz"], ["defgh", "ab"], ["mnop", "mnoq"]]
    assert account.reasons == {"cut": 1}
    assert account.trained_tokens == 12
    assert [parts(sample)[0].weights for sample in found.train][1] == [0.0, 0.0, 0.0, 1.0, 1.0]


def test_the_form_is_part_of_what_prepared_data_are_known_by() -> None:
    session: Any = SimpleNamespace(model_ref=SimpleNamespace(folder=None))
    plain, pair = content(session, Letters()), content(session, Formed(Letters(), Two()))  # type: ignore[arg-type]
    assert plain[0] == pair[0]
    assert len(plain) == 1
    assert pair[1] == "Two"
