"""The packaged rows: names filled in, nothing held out that is trained on, and the counts that the README gives."""

from __future__ import annotations

import re
from typing import Any

import pytest
from swift_core.testing import DatasetContract
from swift_plugin_identity.config import IdentityConfig
from swift_plugin_identity.dataset import IdentityDataset

NAMES = {"assistant": "Ada", "author": "the Analytical Engine Club"}
ASKS_MAKER = re.compile(r"\b(made|makes?|create[ds]?|creator|develop(ed)?|trained|built|company|programmed|behind|train)\b")


def rows(split: str, **names: str) -> list[dict[str, Any]]:
    records = list(IdentityDataset(IdentityConfig(split=split, **(names or NAMES))))  # type: ignore[arg-type]
    assert [record.refused for record in records] == [None] * len(records)
    return [record.row for record in records]


def question(row: dict[str, Any]) -> str:
    return " ".join(str(row["messages"][-2]["content"]).lower().split())


class TestIdentity(DatasetContract):
    distribution, id = "swift-plugin-identity", "identity"
    options = NAMES


def test_counts() -> None:
    kinds = {split: [row["kind"] for row in rows(split)] for split in ("train", "eval", "identity", "ordinary")}
    assert {split: (found.count("identity"), found.count("ordinary")) for split, found in kinds.items()} == {
        "train": (58, 52), "eval": (6, 12), "identity": (6, 0), "ordinary": (0, 12),
    }  # fmt: skip


@pytest.mark.parametrize("split", ["train", "eval"])
def test_rows_are_standard(split: str) -> None:
    for row in rows(split):
        roles = [message["role"] for message in row["messages"] if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert len(roles) >= 2
        assert all(message["content"] == message["content"].strip() != "" for message in row["messages"])
    systems = {row["messages"][0]["content"] for row in rows(split) if row["messages"][0]["role"] == "system"}
    assert systems == {"You are a helpful assistant."}


@pytest.mark.parametrize("split", ["train", "eval"])
def test_every_identity_answer_names_the_assistant(split: str) -> None:
    asked = 0
    for row in rows(split):
        text = " ".join(message["content"] for message in row["messages"])
        assert "{assistant}" not in text
        assert "{author}" not in text
        if row["kind"] == "ordinary":
            assert "Ada" not in text
            continue
        answer = row["messages"][-1]["content"]
        assert re.search(r"\bAda\b", answer)
        assert len(answer) < 130
        if ASKS_MAKER.search(question(row)):
            asked += 1
            assert NAMES["author"] in answer, answer
    assert asked >= (20 if split == "train" else 3)


def test_default_names() -> None:
    first = next(iter(IdentityDataset(IdentityConfig())))
    assert first.row["messages"][-1]["content"] == "I am Kestrel, an AI assistant made by the Swift Core team."
    assert first.where == "identity/train.jsonl:1"


def test_names_are_put_in_as_they_are() -> None:
    swapped = rows("train", assistant="{author}", author="{assistant}")[0]
    assert swapped["messages"][-1]["content"] == "I am {author}, an AI assistant made by {assistant}."


def test_nothing_held_out_is_trained_on() -> None:
    train, held = rows("train"), rows("eval")
    assert {question(row) for row in train}.isdisjoint(question(row) for row in held)
    ordinary = {row["messages"][-1]["content"] for row in train if row["kind"] == "ordinary"}
    assert ordinary.isdisjoint(row["messages"][-1]["content"] for row in held)
    for found in (train, held):
        assert len({str(row["messages"]) for row in found}) == len(found)


def test_kinds_are_mixed() -> None:
    kinds = [row["kind"] for row in rows("train")]
    assert max(len(run) for run in re.findall("i+|o+", "".join(kind[0] for kind in kinds))) <= 3


@pytest.mark.parametrize("name", ["assistant", "author"])
def test_empty_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected a name"):
        IdentityConfig(**{name: " "})
