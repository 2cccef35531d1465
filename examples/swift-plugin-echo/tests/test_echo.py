"""The contracts of an engine and of a part, and what is particular to these two."""

from __future__ import annotations

import pytest
from swift_core.errors import CapabilityError, RequestError
from swift_core.session import Component, RunConfig, Session
from swift_core.testing import EngineContract, PartContract
from swift_core.types import Completion, Request
from swift_plugin_echo.config import EchoConfig
from swift_plugin_echo.engine import EchoEngine
from swift_plugin_echo.length import length


class TestEcho(EngineContract):
    distribution, id, options = "swift-plugin-echo", "echo", {"upper": True}

    @pytest.fixture
    def source(self) -> str:
        """Any folder will do: this engine opens none."""
        return "."


class TestLength(PartContract):
    distribution, id = "swift-plugin-echo", "metric/length"


def answer(text: str, stream: bool = False, max_tokens: int = 256, **options: bool) -> list[Completion]:
    request = Request([{"role": "system", "content": "x"}, {"role": "user", "content": text}], max_tokens=max_tokens)
    return list(EchoEngine(EchoConfig(**options)).generate([request], stream))


def test_echoes_the_last_message() -> None:
    (done,) = answer("hé")
    assert (done.text, done.token_ids, done.finish, done.prompt_tokens) == ("hé", [104, 195, 169], "stop", 3)


def test_upper() -> None:
    assert answer("hé", upper=True)[0].text == "HÉ"


def test_max_tokens_cuts_between_letters() -> None:
    (done,) = answer("hé!", max_tokens=2)
    assert (done.text, len(done.token_ids), done.finish) == ("h", 2, "length")


def test_streams_letters_then_the_whole() -> None:
    pieces = answer("abc", stream=True)
    assert [piece.text for piece in pieces] == ["a", "b", "c", "abc"]
    assert [piece.finish for piece in pieces] == [None, None, None, "stop"]


def test_says_what_it_cannot_do() -> None:
    with pytest.raises(CapabilityError, match="engine echo has no weights"):
        EchoEngine(EchoConfig()).sync_weights(iter(()), 1)


def test_a_negative_delay_is_a_wrong_request() -> None:
    with pytest.raises(RequestError, match=r"^engine.echo: delay must be at least 0 seconds, not -1.0$"):
        Session(RunConfig()).choose("engines", Component("echo", options={"delay": -1}))


@pytest.mark.parametrize(
    ("prediction", "reference", "score"), [("ab", "abcd", 0.5), ("abcd", "ab", 0.5), ("", "", 1.0), ("", "a", 0.0)]
)
def test_length(prediction: str, reference: str, score: float) -> None:
    assert length(prediction, reference) == score
