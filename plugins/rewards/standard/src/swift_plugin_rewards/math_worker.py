"""Compares answers by math-verify: a question a line on standard input, 1, 0 or null a line on standard output."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, StringExtractionConfig, parse, verify

MARKED = re.compile(r"\$|\\boxed|\\\(|\\\[|####")
PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")  # words that are no LaTeX commands
LETTER = re.compile(r"\(?([A-J])\)?\.?")
CHOICES = StringExtractionConfig(strings=tuple("ABCDEFGHIJ"))
BOXED = [LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0)]


@lru_cache(4096)
def gold_of(text: str, timeout: int) -> tuple[list[Any], bool]:
    """A right answer as mathematics, and whether it is a choice's letter. Bare LaTeX is read as if in dollars, before a
    number in it is; empty where it is neither."""
    if choice := LETTER.fullmatch(text.strip()):
        return [choice[1].lower()], True
    bare = not MARKED.search(text) and "\n" not in text.strip()
    forms = [text]
    if bare and not PROSE.search(text):
        forms = [f"${text}$", text]
    elif bare and "\\" in text:
        forms = [text, f"${text}$"]
    for form in forms:
        if found := parse(form, parsing_timeout=timeout):
            return found, False
    return [], False


def compare(question: dict[str, Any]) -> int | None:
    timeout = question["timeout"]
    gold, choice = gold_of(question["gold"], timeout)
    if not gold:
        return None
    said = question["said"]
    if choice:
        boxed = re.findall(r"\\boxed\{\s*(?:\\text\{)?\s*\(?([A-J])\b", said)
        told = boxed or (
            [] if question["boxed"]
            else [each for each in parse(said, [CHOICES], parsing_timeout=timeout) if isinstance(each, str)]
        )  # fmt: skip
        return int(bool(told) and str(told[-1]).lower() == gold[0])
    if question["boxed"]:
        boxes = said.rfind("\\boxed")
        answer = parse(f"${said[boxes:]}$", BOXED, parsing_timeout=timeout) if boxes >= 0 else []
    else:
        answer = parse(said, parsing_timeout=timeout) or parse(f"${said}$", parsing_timeout=timeout)
    return int(bool(answer) and verify(gold, answer, timeout_seconds=timeout))


def main() -> None:
    logging.disable(logging.CRITICAL)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    out.write("ready\n")
    out.flush()
    for line in sys.stdin:
        try:
            value = compare(json.loads(line))
        except (Exception, RecursionError):
            value = 0
        out.write(json.dumps(value) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
