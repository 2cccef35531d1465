"""The engine sglang: what it sends and reads, against exchanges of its documented API, and the real server where CUDA is.

`exchanges.json` says where they come from: from documentation, not from a run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from swift_core.errors import CapabilityError
from swift_core.types import Constraint, Request
from swift_plugin_openai.testing import ReplayContract
from swift_plugin_sglang.config import SglangConfig
from swift_plugin_sglang.engine import SglangEngine


def adapter(folder: Path) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    (folder / "adapter_model.safetensors").touch()
    return folder


class TestSglang(ReplayContract):
    engine_class, config_class = SglangEngine, SglangConfig
    exchanges = Path(__file__).with_name("exchanges.json")

    def test_a_stream_with_adapter_seed_and_constraint(
        self, engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(type(engine.server), "running", property(lambda self: True))
        engine.load_adapter("a", adapter(tmp_path / "a"))
        drawn: dict[str, Any] = {"temperature": 1.0, "top_k": 20, "seed": 3, "constraint": Constraint("regex", "[a-c]+")}
        asked = Request(token_ids=[5, 6, 7], max_tokens=2, adapter="a", **drawn)
        found = list(engine.generate([asked], stream=True))
        assert [(piece.text, piece.token_ids, piece.logprobs) for piece in found[:-1]] == [
            ("a", [97], [-0.5]),
            ("c", [99], [-0.25]),
        ]
        assert (found[-1].text, found[-1].token_ids, found[-1].finish) == ("ac", [97, 99], "length")
        engine.unload_adapter("a")
        monkeypatch.undo()
        with pytest.raises(CapabilityError, match="no Lark grammar"):
            list(engine.generate([Request(token_ids=[5], constraint=Constraint("grammar", "start: /a/"))]))

    def test_command(self, engine: Any) -> None:
        words = engine.command(99)
        assert words[2:4] == ["-m", "sglang.launch_server"]
        assert words[words.index("--port") + 1] == "99"
        assert words[words.index("--host") + 1] == "127.0.0.1"
        assert words[words.index("--model-path") + 1] == str(Path("m").absolute())
