"""The job that every tool runs, and its rows: read once, written in one form that all tools take.

The rows are OpenAI messages with the system message that the checkpoint's template writes by itself, spelt out, so that no
tool can leave it out or put in another. The schedule is the one that all tools have alike: cosine, without warm-up.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
"""What SmolLM2's chat template puts in where a conversation has no system message."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One training run. batch: rows of a step. limit: steps at most; None is the whole epoch. workers: processes that prepare
    the data."""

    model: Path
    train: Path
    batch: int = 4
    rank: int = 8
    alpha: int = 16
    rate: float = 1e-4
    max_length: int = 1024
    seed: int = 0
    threads: int = 2
    limit: int | None = None
    workers: int = 1


def read_rows(file: Path) -> list[Row]:
    """Standard rows of an Alpaca .json or .jsonl file, or of one that holds `messages` already.

    The input, where there is one, follows the instruction on a line of its own. Raises ValueError with the row's number.
    """
    text = file.read_text(encoding="utf-8")
    raw = json.loads(text) if file.suffix == ".json" else [json.loads(line) for line in text.splitlines() if line.strip()]
    return [standard_row(row, number) for number, row in enumerate(raw)]


def standard_row(row: Row, number: int) -> Row:
    """`row` as system, user and assistant message. Raises ValueError where it is not Alpaca's form."""
    if "messages" in row:
        messages = row["messages"]
        return {"messages": messages if messages[0]["role"] == "system" else [message("system", SYSTEM), *messages]}
    try:
        asked = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
        return {"messages": [message("system", SYSTEM), message("user", asked), message("assistant", row["output"])]}
    except KeyError as err:
        raise ValueError(f"row {number}: no {err}; keys found: {', '.join(row)}") from None


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def write_rows(rows: list[Row], file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def synthetic_rows(count: int, rows: list[Row], seed: int = 0) -> list[Row]:
    """`count` different rows of real words: each takes an instruction and some sentences of other rows' answers.

    rows: standard rows to draw from. The lengths vary as those of the answers drawn from do.
    """
    rng = random.Random(seed)
    asked = [row["messages"][1]["content"] for row in rows]
    sentences = [s.strip() for row in rows for s in row["messages"][2]["content"].replace("\n", " ").split(". ") if s.strip()]
    made = []
    for number in range(count):
        answer = ". ".join(rng.choices(sentences, k=rng.randint(1, 12)))
        question = f"{number}. {rng.choice(asked)}"
        made.append({"messages": [message("system", SYSTEM), message("user", question), message("assistant", answer + ".")]})
    return made


def row_of_words(words: int) -> Row:
    """A row whose answer is one frequent word, `words` times: about as many tokens."""
    return {
        "messages": [message("system", SYSTEM), message("user", "Go on."), message("assistant", "the" + " the" * (words - 1))]
    }
