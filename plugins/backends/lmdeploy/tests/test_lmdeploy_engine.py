"""The engine lmdeploy: what it sends and reads, against exchanges of its documented API, and the real server where CUDA is.

`exchanges.json` says where they come from: from documentation, not from a run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from swift_core.errors import CapabilityError
from swift_core.types import Constraint, Request
from swift_plugin_lmdeploy.config import LmdeployConfig
from swift_plugin_lmdeploy.engine import LmdeployEngine
from swift_plugin_openai.testing import ReplayContract


class TestLmdeploy(ReplayContract):
    engine_class, config_class = LmdeployEngine, LmdeployConfig
    exchanges = Path(__file__).with_name("exchanges.json")

    def test_a_stream_and_what_it_lacks(self, engine: Any) -> None:
        asked = Request(token_ids=[5, 6, 7], max_tokens=2, temperature=0.5, top_k=20)
        found = list(engine.generate([asked], stream=True))
        assert [(piece.text, piece.token_ids, piece.logprobs) for piece in found[:-1]] == [
            ("a", [97], [-0.5]),
            ("c", [99], [-0.25]),
        ]
        assert (found[-1].text, found[-1].token_ids, found[-1].finish) == ("ac", [97, 99], "length")
        for request, message in (
            (Request(token_ids=[5], seed=1), "has no seed"),
            (Request(token_ids=[5], n=2, temperature=1.0), "draws one answer"),
            (Request(token_ids=[5], constraint=Constraint("json_object")), "has no constraints"),
        ):
            with pytest.raises(CapabilityError, match=message):
                list(engine.generate([request]))

    def test_command(self, engine: Any) -> None:
        words = engine.command(99)
        assert words[2:6] == ["-m", "lmdeploy", "serve", "api_server"]
        assert words[words.index("--server-port") + 1] == "99"
        assert words[words.index("--server-name") + 1] == "127.0.0.1"
