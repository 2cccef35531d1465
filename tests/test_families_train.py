"""A folder copied under a name that says nothing, of each family that the library has a model of, trains: without a model type
being named, and with a chat template of its own. A family without a text model trains one that sees pictures, on rows
that have one. The models are tiny and random, and the longest part is importing them.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image
from support import summary, swift
from swift_core.config import Component
from swift_core.index import build_index
from swift_core.models import resolve_model
from swift_core.registry import Registry
from swift_core.types import Row

pytestmark = pytest.mark.slow

ROWS = [
    {"messages": [{"role": "user", "content": f"What is {n} and {n}?"}, {"role": "assistant", "content": f"It is {2 * n}."}]}
    for n in range(4)
]


def families() -> dict[str, list[str]]:
    """The architectures of each family that has a table."""
    found = [c for c in Registry(build_index()).all("models") if c.entry.options.get("checkpoints")]
    return {c.plugin.name.removeprefix("swift-plugin-"): c.entry.options["architectures"] for c in found}


def shown(row: Row) -> Row:
    """The row, about a picture."""
    question, answer = row["messages"]
    return {"messages": [{**question, "content": f"<image>{question['content']}"}, answer], "images": ["teal.png"]}


@pytest.mark.parametrize("family", families())
def test_a_copied_folder_trains(family: str, tmp_path: Path) -> None:
    from swift_plugin_verify.build import CannotBuild, build
    from swift_plugin_verify.catalog import architectures

    known = [one for one in architectures() if one.name in families()[family]]
    mine = next((found for kind in ("text", "image") if (found := [one for one in known if one.kind == kind])), [])
    if not mine:
        pytest.skip("the transformers library has no class of this family that generates: hub code, or encoders")
    reasons = []
    for architecture in mine:
        try:
            build(architecture, tmp_path / "made")
            break
        except CannotBuild as err:
            reasons.append(f"{architecture.name}: {err}")
            shutil.rmtree(tmp_path / "made", ignore_errors=True)
    else:
        if all(re.search("torchvision|timm|an encoder-decoder", reason) for reason in reasons):
            pytest.skip(f"a library is not installed, or encoder-decoders only: {reasons[0]}")
        pytest.fail("; ".join(reasons))
    copied, data = tmp_path / "x7f3-Llama-Qwen", tmp_path / "rows.jsonl"
    shutil.copytree(tmp_path / "made", copied)
    rows = ROWS if architecture.kind == "text" else [*map(shown, ROWS)]
    Image.new("RGB", (64, 48), "teal").save(tmp_path / "teal.png")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    ref = resolve_model(Registry(build_index()), Component(str(copied)))
    assert ref.family
    assert (ref.family.plugin.name, ref.architecture, ref.remote_code) == (f"swift-plugin-{family}", architecture.name, False)
    out = tmp_path / "out"
    swift(
        "train", "--model", copied, "--dataset", data, "--tuner", "full", "--output", out,
        "trainer.max_steps=2", "trainer.batch_size=2", "trainer.learning_rate=1e-3",
    ).ok()  # fmt: skip
    assert summary(out)["trained_tokens"] > 0
    assert (
        json.loads((out / "plan.json").read_text(encoding="utf-8"))["components"]["model"]["architecture"] == architecture.name
    )
