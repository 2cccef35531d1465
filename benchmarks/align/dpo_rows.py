"""Pairs of a preference file in the forms that the tools take. Runs in swift-core's environment, which has the tokenizer.

    python dpo_rows.py MODEL DATA FOLDER ROWS MAX_LENGTH

Takes ShareGPT rows (`conversations`, `chosen`, `rejected`), the first ROWS of those of which each side has at most MAX_LENGTH
tokens. Writes messages.jsonl (messages, rejected_response) and prompts.jsonl (prompt, chosen, rejected). Prints what it took.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


def spoken(turn: dict[str, str]) -> dict[str, str]:
    return {"role": ROLES[turn["from"]], "content": turn["value"]}


def pair(row: dict[str, Any]) -> tuple[list[dict[str, str]], dict[str, str], dict[str, str]] | None:
    """Prompt, chosen and rejected answer; None where the prompt does not end with a question or the answers are the same."""
    prompt = [spoken(turn) for turn in row["conversations"]]
    if prompt[0]["role"] != "system":
        prompt.insert(0, {"role": "system", "content": SYSTEM})
    chosen, rejected = spoken(row["chosen"]), spoken(row["rejected"])
    return None if prompt[-1]["role"] != "user" or chosen == rejected else (prompt, chosen, rejected)


def main(model: str, data: str, folder: str, rows: str, max_length: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def count(messages: list[dict[str, str]]) -> int:
        return len(tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"])

    taken, tokens, shared = [], 0, 0
    for row in json.loads(Path(data).read_text(encoding="utf-8")):
        found = pair(row)
        if found is None or len(taken) == int(rows):
            continue
        prompt, chosen, rejected = found
        sizes = [count([*prompt, answer]) for answer in (chosen, rejected)]
        if max(sizes) <= int(max_length):
            taken.append((*found, sum(sizes)))
            tokens, shared = tokens + sum(sizes), shared + count(prompt)
    out = Path(folder)
    with (out / "messages.jsonl").open("w", encoding="utf-8") as messages, (out / "prompts.jsonl").open("w") as prompts:
        for prompt, chosen, rejected, size in taken:
            print(json.dumps({"messages": [*prompt, chosen], "rejected_response": rejected["content"]}), file=messages)
            print(json.dumps({"prompt": prompt, "chosen": [chosen], "rejected": [rejected], "length": size}), file=prompts)
    print(json.dumps({"rows": len(taken), "tokens": tokens, "of_prompts": shared}))


if __name__ == "__main__":
    main(*sys.argv[1:])
