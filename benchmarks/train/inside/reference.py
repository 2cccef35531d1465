"""What should be trained, worked out apart from all tools: the checkpoint's chat template renders a row, and the answer with
its end marker is trained.

    python reference.py MODEL ROWS.jsonl FILE              writes ids and labels of each row to FILE
    python reference.py MODEL INSPECTED.jsonl FILE         the same from the lines of `swift-core inspect --json`
"""

import json
import sys
from pathlib import Path
from typing import Any

END = "<|im_end|>"


def labelled(tokenizer: Any, text: str, start: int, end: int) -> dict[str, list[int]]:
    """Ids of `text`, and labels: the ids of the tokens that begin in characters [start, end), else -100."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return {"ids": encoded["input_ids"], "labels": [token if start <= first < end else -100 for token, (first, _) in pairs]}


def from_row(tokenizer: Any, row: dict[str, Any]) -> dict[str, list[int]]:
    """A standard row with one answer, its last message."""
    messages = row["messages"]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    answer = messages[-1]["content"] + END
    if not text.startswith(prompt + answer):
        raise ValueError(f"the template does not write the answer after the prompt: {text!r}")
    found = labelled(tokenizer, text, len(prompt), len(prompt) + len(answer))
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    if ids != found["ids"]:
        raise ValueError(f"tokenizing the rendered text differs from apply_chat_template: {text!r}")
    return found


def from_inspected(tokenizer: Any, line: dict[str, Any]) -> dict[str, list[int]]:
    ((start, end),) = line["trained"]
    found = labelled(tokenizer, line["text"], start, end)
    trained = sum(label != -100 for label in found["labels"])
    if (len(found["ids"]), trained) != (line["tokens"], line["trained_tokens"]):
        raise ValueError(
            f"row {line['row']}: inspect says {line['tokens']} tokens, {line['trained_tokens']} trained; "
            f"counted {len(found['ids'])}, {trained}"
        )
    return found


def main() -> None:
    from transformers import AutoTokenizer

    model, rows, target = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = [json.loads(line) for line in Path(rows).read_text(encoding="utf-8").splitlines() if line.startswith("{")]
    made = [from_row(tokenizer, line) if "messages" in line else from_inspected(tokenizer, line) for line in lines]
    Path(target).write_text("".join(json.dumps(one) + "\n" for one in made), encoding="utf-8")


if __name__ == "__main__":
    main()
