"""A server of ours as the engine of another run: the engine `openai` gets from it what the engine in this process gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from swift_core.config import load_config
from swift_core.session import Opened, Session
from swift_core.types import Request

IDS = [[5, 60, 70, 80, 90], list(range(40, 75))]


@pytest.fixture(scope="module")
def near(sharp_folder: Path) -> Iterator[Opened]:
    with Session(load_config([], ["backend.precision=fp32"], {"model": str(sharp_folder)})) as session:
        yield session.opened()


@pytest.fixture(scope="module")
def far(served: Any) -> Iterator[Opened]:
    with Session(load_config([], [], {"engine": "openai", "model": served.url})) as session:
        yield session.opened()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("asked", [{"token_ids": IDS[0]}, {"messages": [{"role": "user", "content": "Where is the tea?"}]}])
def test_answers_come_with_ids_and_log_probabilities(asked: dict[str, Any], stream: bool, near: Opened, far: Opened) -> None:
    request = Request(**asked, max_tokens=12, top_logprobs=3)
    (expected,) = [found for found in near.engine.generate([request]) if found.finish]
    pieces = list(far.engine.generate([request], stream=stream))
    found = pieces[-1]
    assert (found.token_ids, found.text, found.finish) == (expected.token_ids, expected.text, expected.finish)
    assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    assert found.prompt_tokens == expected.prompt_tokens
    for one, other in zip(found.top_logprobs, expected.top_logprobs, strict=True):
        assert dict(one).keys() >= dict(other).keys()
    if stream:
        assert [token for piece in pieces[:-1] for token in piece.token_ids] == expected.token_ids


def test_prompts_are_scored(near: Opened, far: Opened) -> None:
    for one, other in zip(far.engine.logprobs(IDS), near.engine.logprobs(IDS), strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    theirs, ours = (opened.engine.likeliest(IDS, 4) for opened in (far, near))  # type: ignore[attr-defined]
    for one, other in zip(theirs, ours, strict=True):
        for mine, wanted in zip(one, other, strict=True):
            assert [token for token, _ in mine] == [token for token, _ in wanted]
            assert [value for _, value in mine] == pytest.approx([value for _, value in wanted], abs=1e-4)


def test_what_does_not_go_together_is_told(served: Any) -> None:
    body = {"model": "tiny", "prompt": IDS[0], "max_tokens": 2, "prompt_logprobs": 1}
    for more in ({"echo": True}, {"stream": True}):
        answer = httpx.post(f"{served.url}/completions", json=body | more)
        assert (answer.status_code, answer.json()["error"]["message"]) == (400, "prompt_logprobs goes without echo and stream")
    whole = httpx.post(f"{served.url}/completions", json=body | {"return_token_ids": True}).json()
    assert whole["choices"][0]["prompt_token_ids"] == IDS[0]
    assert len(whole["choices"][0]["token_ids"]) == 2
    assert whole["choices"][0]["prompt_logprobs"][0] is None
