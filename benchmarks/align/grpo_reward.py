"""The reward of the GRPO benchmark, the same function for all tools: the share of an answer's characters that are vowels.

swift-core and TRL call it as a function; for ms-swift it is registered under the name `vowels`.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any


def share(text: str) -> float:
    return sum(letter in "aeiouAEIOU" for letter in text) / max(1, len(text))


def vowels(completions: list[Any], *rows: Any, **columns: Any) -> list[float]:
    """completions: texts, or conversations as TRL gives them."""
    return [share(said if isinstance(said, str) else said[0]["content"]) for said in completions]


def register() -> None:
    """For ms-swift, which imports this file by --external_plugins."""
    from swift.rewards import ORM, orms  # type: ignore[import-not-found]

    class Vowels(ORM):  # type: ignore[misc]
        def __call__(self, completions: list[str], **columns: Any) -> list[float]:
            return [share(said) for said in completions]

    orms["vowels"] = Vowels


with suppress(ImportError):  # in another tool's environment
    register()
