"""A folder copied under a random name, of each family, trains: without a model type being named.

Where the library has a class of the family that writes, a tiny random one of it trains on conversations, with a picture
where the family reads no plain text. Encoders train with a head. A family whose code comes with its checkpoints has a
stand-in: a folder with Python files of its own, under the family's architecture, which trains where they are trusted.
"""

from __future__ import annotations

import json
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support import summary, swift
from swift_core.config import Component
from swift_core.index import build_index
from swift_core.models import resolve_model
from swift_core.registry import Contribution, Registry
from swift_core.types import Row

ROWS: list[Row] = [
    {"messages": [{"role": "user", "content": f"What is {n} and {n}?"}, {"role": "assistant", "content": f"It is {2 * n}."}]}
    for n in range(4)
]
PAIRS: list[Row] = [{"query": f"what is {n}", "positive": f"{n} is a number", "negatives": [f"no {n}"]} for n in range(4)]
CLASSES: list[Row] = [{"text": f"{n} is {'odd' if n % 2 else 'even'}", "label": n % 2} for n in range(4)]

REGISTRY = Registry(build_index())
FAMILIES: dict[str, Contribution] = {
    c.plugin.name.removeprefix("swift-plugin-"): c for c in REGISTRY.all("models") if c.entry.options.get("checkpoints")
}
SAMPLE = {"gemma", "glm", "gte", "iquest", "mistral", "mplug", "openbuddy", "qwen", "smollm", "t5", "xverse", "yuan"}
"""Those that are tried each time, in a second or two each; the others are slow together."""
HEADED = {
    "bert": ("bert", "BertForMaskedLM", "classify", CLASSES, ("model.num_labels=2",)),
    "gte": ("nomic_bert", "NomicBertModel", "embed", PAIRS, ()),
}
"""Encoders: model type, class, trainer, rows, settings."""


def marked(names: Any) -> list[Any]:
    return [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow) for name in names]


@dataclass(frozen=True)
class Made:
    """A folder, the architecture that its config.json names, and what a run of it is given."""

    folder: Path
    architecture: str
    rows: list[Row]
    settings: tuple[str, ...] = ()
    owner: str | None = None  # the family that lists it, where it is another
    code: bool = False


def shown(row: Row) -> Row:
    """The row, about a picture."""
    question, answer = row["messages"]
    return {"messages": [{**question, "content": f"<image>{question['content']}"}, answer], "images": ["teal.png"]}


def names_of(family: str) -> set[str]:
    """Architectures and model types of a family; of one that has none of its own, those that its checkpoints have."""
    options = FAMILIES[family].entry.options
    own = {*options["architectures"], *(options.get("model_types") or ())}
    return own or {row["architecture"] for row in REGISTRY.checkpoints(FAMILIES[family])}


def of_the_library(family: str, folder: Path) -> Made | None:
    """A tiny model of the first class of the library that can be built here; None where it has none that writes."""
    from swift_plugin_verify.build import CannotBuild, build
    from swift_plugin_verify.catalog import architectures

    known = [one for one in architectures() if {one.name, one.model_type} & names_of(family)]
    mine = next((found for kind in ("text", "image") if (found := [one for one in known if one.kind == kind])), [])
    reasons = []
    for one in mine:
        try:
            build(one, folder)
        except CannotBuild as err:
            reasons.append(f"{one.name}: {err}")
            shutil.rmtree(folder, ignore_errors=True)
            continue
        own = FAMILIES[family].entry.options["architectures"]
        name = one.name
        if own and name not in own:  # known by its type: its checkpoints name a class that the library does not have
            name = next(other for other in own if other.lower().startswith(one.model_type))
            rename(folder, name)
        rows = ROWS if one.kind == "text" else [*map(shown, ROWS)]
        return Made(folder, name, rows, owner=None if own else "llama")
    if reasons and all(re.search("torchvision|timm", reason) for reason in reasons):
        pytest.skip(f"a library is not installed: {reasons[0]}")
    assert not reasons, "; ".join(reasons)
    return None


def rename(folder: Path, architecture: str, **more: Any) -> None:
    """Let config.json name another architecture."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [architecture], **more}), encoding="utf-8")


def of_its_own_code(family: str, folder: Path) -> Made:
    """A Llama under the family's own names, with the Python files that make it so."""
    import transformers
    from swift_plugin_verify.tokens import VOCABULARY, make_tokenizer

    architecture = next(name for name in FAMILIES[family].entry.options["architectures"] if not hasattr(transformers, name))
    shape = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": VOCABULARY, "max_position_embeddings": 512, "pad_token_id": 0,
    }  # fmt: skip
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n"
        f'    model_type = "{architecture.lower()}_own"\n',
        encoding="utf-8",
    )
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_own import OwnConfig\n\n\n"
        f"class {architecture}(LlamaForCausalLM):\n    config_class = OwnConfig\n",
        encoding="utf-8",
    )
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": f"modeling_own.{architecture}"}
    rename(folder, architecture, model_type=f"{architecture.lower()}_own", auto_map=classes)
    return Made(folder, architecture, ROWS, code=True)


def trained(family: str, made: Made, tmp_path: Path, *more: str) -> None:
    """Copy the folder, see that it is resolved, and train it for two steps."""
    copied, data, out = tmp_path / f"x{uuid.uuid4().hex[:8]}-Llama-Qwen", tmp_path / "rows.jsonl", tmp_path / "out"
    shutil.copytree(made.folder, copied)
    Image.new("RGB", (64, 48), "teal").save(tmp_path / "teal.png")
    data.write_text("".join(json.dumps(row) + "\n" for row in made.rows), encoding="utf-8")
    ref = resolve_model(REGISTRY, Component(str(copied)))
    assert ref.family
    found = ref.family.plugin.name, ref.architecture, ref.remote_code
    assert found == (f"swift-plugin-{made.owner or family}", made.architecture, made.code)
    run = (
        "train", "--model", copied, "--dataset", data, "--tuner", "full", "--output", out,
        "trainer.max_steps=2", "trainer.batch_size=2", "trainer.learning_rate=1e-3", *made.settings, *more,
    )  # fmt: skip
    if made.code:
        from transformers.utils.hub import HF_MODULES_CACHE

        refused = swift(*run)
        assert refused.code == 2
        assert refused.error.startswith(f"model {copied.resolve()} needs Python code of its own")
        assert refused.error.endswith("let it run with --trust-remote-code")
        run = (*run, "--trust-remote-code")
    swift(*run).ok()
    if made.code:  # the library keeps a copy of the code under the folder's name
        kept = Path(HF_MODULES_CACHE) / "transformers_modules" / copied.name.replace("-", "_hyphen_")
        assert list(kept.rglob("modeling_own.py"))
        shutil.rmtree(kept)
    assert summary(out)["trained_tokens"] > 0
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    assert plan["components"]["model"]["architecture"] == made.architecture


@pytest.mark.parametrize("family", marked(name for name in FAMILIES if name != "gte"))
def test_a_copied_folder_trains(family: str, tmp_path: Path) -> None:
    made = of_the_library(family, tmp_path / "made") or of_its_own_code(family, tmp_path / "made")
    trained(family, made, tmp_path)


@pytest.mark.parametrize("family", marked(HEADED))
def test_a_copied_encoder_trains_with_a_head(family: str, tmp_path: Path) -> None:
    from swift_plugin_verify.build import build
    from swift_plugin_verify.catalog import Architecture

    model_type, name, trainer, rows, settings = HEADED[family]
    build(Architecture("text", model_type, name), tmp_path / "made")
    made = Made(tmp_path / "made", name, rows, settings)
    trained(family, made, tmp_path, "--trainer", trainer)
