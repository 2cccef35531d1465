"""The reward `format`: whether an answer, its reasoning included, has a form."""

from __future__ import annotations

import re

from swift_core.types import Row

from swift_plugin_rewards.answer import raw_of
from swift_plugin_rewards.config import FormatConfig

NOT = r"(?:(?!</?think>|</?answer>).)"  # any character at which no mark begins
FORMS = {
    "think": rf"{NOT}*</think>\s*(?!\s){NOT}+",
    "think_answer": rf"{NOT}*</think>\s*<answer>{NOT}*</answer>\s*",
}


class Format:
    def __init__(self, config: FormatConfig) -> None:
        begin = "" if config.opened else r"\s*<think>"
        pattern = config.pattern if config.pattern is not None else begin + FORMS[config.form]
        self.pattern = re.compile(pattern, re.DOTALL)

    def __call__(self, completions: list[str], rows: list[Row]) -> list[float]:
        return [float(bool(self.pattern.fullmatch(raw_of(said)))) for said in completions]
