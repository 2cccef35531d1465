"""Options of the engine `openai`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from swift_core.config import option


@dataclass(frozen=True)
class OpenAIConfig:
    """`engine: {name: openai, model: gpt-x, api_key_env: MY_KEY}`. Raises ValueError for a number out of range."""

    model: str | None = option(None, "the model's name at the server; without it the only one that the server lists")
    api_key_env: str | None = option(
        None, "environment variable that holds the API key; at api.openai.com OPENAI_API_KEY, elsewhere none is sent unasked"
    )
    dialect: Literal["auto", "openai", "vllm"] = option(
        "auto",
        "options beyond OpenAI's: vllm sends top_k, min_p, repetition_penalty, token ids and the like, openai refuses them; "
        "auto asks the server's list of models whose it is",
    )
    logprobs: bool = option(False, "ask for log-probabilities with every answer; some servers refuse them")
    concurrent: int = option(16, "requests under way at a time")
    timeout: float = option(600.0, "seconds without a byte after which an answer is given up")
    retries: int = option(5, "further tries after 408, 429, 5xx or a broken connection, with growing pauses")
    max_wait: float = option(60.0, "longest pause before another try, in seconds; a longer Retry-After ends the tries")

    def __post_init__(self) -> None:
        if self.concurrent < 1:
            raise ValueError(f"concurrent must be at least 1, not {self.concurrent}")
        if self.timeout <= 0:
            raise ValueError(f"timeout must be above 0 seconds, not {self.timeout}")
        if self.retries < 0:
            raise ValueError(f"retries must be at least 0, not {self.retries}")
        if self.max_wait < 0:
            raise ValueError(f"max_wait must be at least 0 seconds, not {self.max_wait}")
