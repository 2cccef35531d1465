"""What a family's manifest says of a template's option reaches the template, and gives way to the run's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from swift_core.config import Component, RunConfig
from swift_core.events import EventSink
from swift_core.session import Session

FAMILY = """
[[models]]
id = "boxer"
architectures = ["BoxerForConditionalGeneration"]
[models.grounding]
box = "<box>{x1},{y1},{x2},{y2}</box>"
scale = "norm999"
"""
BY_ARCHITECTURE = FAMILY.replace("[models.grounding]", "[models.grounding.BoxerForConditionalGeneration]")
OF_ANOTHER = FAMILY.replace("[models.grounding]", "[models.grounding.OtherForConditionalGeneration]")
GENERIC = """
[[models]]
id = "any"
generic = true

[[templates]]
id = "checkpoint"
from_model = ["grounding"]
config = "swift_plugin_any.config:Config"
"""
CONFIG = """
from dataclasses import dataclass, field
from typing import Any

@dataclass
class Config:
    grounding: dict[str, Any] = field(default_factory=dict)
"""


@pytest.mark.parametrize(
    ("family", "given", "expected"),
    [
        (FAMILY, {}, {"box": "<box>{x1},{y1},{x2},{y2}</box>", "scale": "norm999"}),
        (FAMILY, {"grounding": {"scale": "real"}}, {"scale": "real"}),
        (BY_ARCHITECTURE, {}, {"box": "<box>{x1},{y1},{x2},{y2}</box>", "scale": "norm999"}),
        (OF_ANOTHER, {}, {}),
    ],
)
def test_a_familys_grounding_reaches_the_template(
    make_plugin: Callable[..., str], tmp_path: Path, family: str, given: dict[str, Any], expected: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    make_plugin("boxer", family)
    make_plugin("any", GENERIC, config=CONFIG)
    monkeypatch.setenv("SWIFT_DISABLE_PLUGINS", "swift-plugin-transformers")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["BoxerForConditionalGeneration"], "model_type": "boxer"}))
    (folder / "chat_template.jinja").write_text("x")
    config = RunConfig(model=Component(str(folder)), template=Component(options=given))
    with Session(config, EventSink()) as session:
        assert session.template_choice(session.model_ref).options.grounding == expected
