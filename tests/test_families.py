"""Every family plugin at once: what its table and its manifest say, held against the published list of ids and against the
sources of the installed transformers library; which family a folder resolves to; and what listing them all costs.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support import swift
from swift_core.config import Component
from swift_core.errors import RequestError
from swift_core.index import build_index
from swift_core.models import ModelRef, resolve_model
from swift_core.registry import Contribution, Registry

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT.parent / "shared" / "reference" / "model-ids.jsonl"
KEYS: dict[str, type] = {
    "id": str, "modelscope": str, "architecture": str, "parameters": str, "active": str, "context": int, "capabilities": list,
    "licence": str, "chat": bool, "remote_code": bool, "requires": list, "note": str,
}  # fmt: skip
CAPABILITIES = {
    "text", "image", "video", "audio", "tools", "thinking", "embedding", "reranker", "reward", "classification",
    "token-classification", "encoder", "image-generation", "speech-generation",
}  # fmt: skip
CPU_SECONDS = 0.2


def family_of(contribution: Contribution) -> str:
    return contribution.plugin.name.removeprefix("swift-plugin-")


@cache
def registry() -> Registry:
    return Registry(build_index())


FAMILIES = {family_of(c): c for c in registry().all("models") if c.entry.options.get("checkpoints")}
every = pytest.mark.parametrize("family", FAMILIES)


@cache
def table(family: str) -> list[dict[str, Any]]:
    return registry().checkpoints(FAMILIES[family])


def all_rows() -> Iterator[tuple[str, dict[str, Any]]]:
    return ((family, row) for family in FAMILIES for row in table(family))


def show(name: str) -> ModelRef:
    return resolve_model(registry(), Component(name))


@cache
def library() -> Path:
    spec = find_spec("transformers")
    assert spec
    assert spec.origin
    return Path(spec.origin).parent


@cache
def sources() -> str:
    """All Python text of the installed transformers library: read, not imported."""
    return "\n".join(path.read_text(encoding="utf-8") for path in library().rglob("*.py"))


@cache
def classes() -> frozenset[str]:
    return frozenset(re.findall(r"^class (\w+)\(", sources(), re.MULTILINE))


@cache
def library_types() -> frozenset[str]:
    """Every model type that a configuration class of the library declares, or that its tables name."""
    declared = re.findall(r'^    model_type(?:: \w+)? = "([^"]+)"', sources(), re.MULTILINE)
    named = "".join(path.read_text(encoding="utf-8") for path in (library() / "models" / "auto").glob("*.py"))
    return frozenset(declared) | frozenset(re.findall(r'\("([\w.-]+)", "\w+"\)', named))


@cache
def reference() -> list[dict[str, Any]]:
    if not REFERENCE.is_file():
        pytest.skip(f"{REFERENCE} is missing")
    return [json.loads(line) for line in REFERENCE.read_text(encoding="utf-8").splitlines()]


# --- tables -----------------------------------------------------------------------------------------------------------


def test_there_are_enough() -> None:
    assert len(FAMILIES) >= 40
    assert sum(len(table(family)) for family in FAMILIES) >= 1300
    assert min(len(table(family)) for family in FAMILIES) >= 1


@every
def test_rows_keep_to_the_schema(family: str) -> None:
    for row in table(family):
        assert {key: type(value) for key, value in row.items()} == {key: KEYS[key] for key in row}, row["id"]
        assert {"id", "architecture", "capabilities", "remote_code"} <= set(row)
        assert re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?", row["id"])
        assert row.get("modelscope") != row["id"]
        assert set(row["capabilities"]) <= CAPABILITIES
        assert row["capabilities"][0] == "text"
        assert re.fullmatch(r"(\d+x)?\d+(\.\d+)?[MBT]", row.get("parameters", "1B"))
        assert re.fullmatch(r"\d+(\.\d+)?[MB]", row.get("active", "1B"))


@every
def test_a_family_says_what_its_rows_can(family: str) -> None:
    said = {capability for row in table(family) for capability in row["capabilities"]}
    assert set(FAMILIES[family].entry.capabilities) == said


def test_an_id_stands_once() -> None:
    for key in ("id", "modelscope"):
        counts = Counter(row.get(key, row["id"]) for _, row in all_rows())
        assert [name for name, count in counts.items() if count > 1] == []


def test_sizes_are_those_of_the_names() -> None:
    sizes = {row["id"]: (row.get("parameters"), row.get("active")) for _, row in all_rows()}
    expected = {
        "Qwen/Qwen3-0.6B-Base": ("0.6B", None), "Qwen/Qwen3-30B-A3B": ("30B", "3B"), "Qwen/Qwen-1_8B-Chat": ("1.8B", None),
        "mistralai/Mixtral-8x7B-v0.1": ("8x7B", None), "meta-llama/Llama-4-Scout-17B-16E": (None, "17B"),
        "allenai/OLMoE-1B-7B-0924": ("7B", "1B"), "inclusionAI/Ling-1T": ("1T", None),
        "state-spaces/mamba-130m-hf": ("130M", None),
        "tencent/Hunyuan-A13B-Instruct": (None, "13B"), "google/gemma-3n-E2B": (None, None), "microsoft/phi-2": (None, None),
        "MiniMaxAI/MiniMax-M1-40k": (None, None), "hfl/chinese-llama-2-7b-16k": ("7B", None),
    }  # fmt: skip
    assert {name: sizes[name] for name in expected} == expected


def test_every_id_has_a_source() -> None:
    """It stands in the published list, or in the transformers library's own sources."""
    known = {row["id"] for row in reference()}
    assert [row["id"] for _, row in all_rows() if row["id"] not in known and row["id"] not in sources()] == []


def test_code_from_the_hub_is_needed_where_the_library_has_no_class() -> None:
    for _, row in all_rows():
        if row["remote_code"]:
            assert row["architecture"] not in classes(), row["id"]
        elif row["architecture"] not in classes():
            own_type = re.search(r"its model type (\w+) is", row["note"])
            assert own_type, row["id"]
            assert own_type[1] in library_types()


# --- the published list -----------------------------------------------------------------------------------------------


def test_every_published_id_resolves_as_it_is_listed() -> None:
    for listed in reference():
        ref = show(listed["id"])
        assert ref.family is not None
        assert ref.architecture in listed["architectures"] or not listed["architectures"], listed["id"]
        assert ref.remote_code == ref.row["remote_code"]
        assert listed["id"] in {row["id"] for row in table(family_of(ref.family))}


def test_modelscope_names_resolve_too() -> None:
    names = {listed["modelscope_id"] for listed in reference()} - {None}
    settled = {"PaddlePaddle/ERNIE-4.5-0.3B-Base-PT"}  # the list gives it to the wrong id, whose note says so
    assert {name for name in names if show(name).family is None} == settled
    assert show("LLM-Research/Meta-Llama-3.1-8B-Instruct").row["id"] == "meta-llama/Meta-Llama-3.1-8B-Instruct"


def test_what_was_settled_by_hand_says_why() -> None:
    bare = {listed["id"] for listed in reference() if not listed["architectures"]}
    twice = {name for name, count in Counter(listed["id"] for listed in reference()).items() if count > 1}
    assert (len(bare), len(twice)) == (9, 2)
    for name in bare:
        assert show(name).row["note"].startswith("The reference names no architecture.")
    for name in twice:
        assert show(name).row["note"].startswith("The reference lists it twice")
    assert show("deepseek-ai/Janus-Pro-7B").architecture == "MultiModalityCausalLM"
    assert show("zai-org/glm-edge-4b-chat").architecture == "GlmForCausalLM"


# --- manifests --------------------------------------------------------------------------------------------------------


def test_the_guide_counts_the_checkpoints_of_each_family() -> None:
    told = re.findall(r"^\| `(\w+)` \| (\d+) \|", (ROOT / "docs" / "families.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {name.replace("_", "-"): int(count) for name, count in told} == {name: len(table(name)) for name in FAMILIES}


def test_no_two_families_claim_one_architecture_or_type() -> None:
    for key in ("architectures", "model_types"):
        owned = Counter(name for c in FAMILIES.values() for name in c.entry.options.get(key, ()))
        assert [name for name, count in owned.items() if count > 1] == []


def test_every_listed_architecture_has_its_family() -> None:
    owned = {name for c in FAMILIES.values() for name in c.entry.options["architectures"]}
    loadable = {row["architecture"] for _, row in all_rows() if "note" not in row}
    assert {name for name in loadable if name not in owned} == set()


@every
def test_types_and_classes_are_the_librarys(family: str) -> None:
    options = FAMILIES[family].entry.options
    assert set(options.get("model_types", ())) <= library_types()
    remote = {row["architecture"] for _, row in all_rows() if row["remote_code"]}
    listed = {name for row in reference() for name in row["architectures"]}
    noted = {row["architecture"] for _, row in all_rows() if "note" in row}
    assert set(options["architectures"]) - classes() <= remote | listed | noted


@every
def test_a_family_is_data(family: str) -> None:
    """Fewer than 60 lines of code, none of which needs torch: test_every_plugin imports them behind a wall."""
    path = FAMILIES[family].plugin.manifest.path  # type: ignore[union-attr]
    code = [file for file in path.parent.glob("*.py") if family != "smollm"]  # which converts the embedded checkpoint too
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in code) < 60
    assert {file.suffix for file in path.parent.iterdir() if file.is_file()} <= {".py", ".toml", ".jsonl", ".jinja"}
    for trap in FAMILIES[family].entry.options.get("traps", ()):
        assert re.fullmatch(r".+\.", trap)


def test_parts_that_structure_does_not_show_are_named() -> None:
    """`[models.parts]` holds patterns of `find_parts`, each of a module that the library's source makes."""
    named = {family: c.entry.options["parts"] for family, c in FAMILIES.items() if "parts" in c.entry.options}
    assert set(named) == {"llama", "ovis", "phi", "qwen"}
    for parts in named.values():
        assert set(parts) <= {"language", "vision", "audio", "projector", "embeddings", "head", "experts"}
        for pattern in (pattern for patterns in parts.values() for pattern in patterns):
            re.compile(pattern.removeprefix("re:"))
            for name in re.sub(r"^re:\((\.\*\\|model\\)\.\)\?", "", pattern).split("\\."):
                for choice in name.strip("()").split("|"):
                    assert re.search(rf"self\.{choice}\b(: [^=\n]+)? =", sources()), pattern


# --- folders ----------------------------------------------------------------------------------------------------------


def test_conventions_for_boxes_can_be_written() -> None:
    """`[models.grounding]`: one for the family, or one for each of its architectures that it names."""
    from swift_plugin_transformers.grounding import Convention

    found = {}
    for family, contribution in FAMILIES.items():
        given = contribution.entry.options.get("grounding", {})
        by_architecture = given if all(isinstance(own, dict) for own in given.values()) else {"*": given}
        assert {"*", *contribution.entry.options["architectures"]} >= by_architecture.keys(), family
        found |= {(family, architecture): Convention(**own) for architecture, own in by_architecture.items()}
    assert found["qwen", "Qwen2_5_VLForConditionalGeneration"].scale == "resized"
    assert found["gemma", "PaliGemmaForConditionalGeneration"].box.format(x1=1, y1=2, x2=3, y2=4) == (
        "<loc0002><loc0001><loc0004><loc0003>"
    )
    assert len(found) >= 4


def folder(path: Path, **config: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


@every
def test_a_folder_resolves_by_its_config_and_not_by_its_name(family: str, tmp_path: Path) -> None:
    options = FAMILIES[family].entry.options
    misleading = "gpt2" if family == "llama" else "Llama-3.1-8B-Instruct"
    for name in options["architectures"]:
        ref = show(str(folder(tmp_path / misleading, architectures=[name], model_type="no-such-type")))
        assert ref.family
        assert (family_of(ref.family), ref.architecture) == (family, name)
    for name in options.get("model_types", ()):
        ref = show(str(folder(tmp_path / "a1b2c3", model_type=name)))
        assert ref.family
        assert (family_of(ref.family), ref.architecture) == (family, None)
        assert ref.remote_code is False
    assert options["architectures"] or family == "openbuddy"  # its models are Llamas and Mistrals


def test_a_folder_with_code_of_its_own_says_so(tmp_path: Path) -> None:
    code = {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    unknown = folder(tmp_path / "unknown", architectures=["XForCausalLM"], model_type="x", auto_map=code)
    hub = folder(tmp_path / "hub", architectures=["InternLM2ForCausalLM"], model_type="internlm2", auto_map=code)
    both = folder(tmp_path / "both", architectures=["InternLM3ForCausalLM"], model_type="internlm3", auto_map=code)
    none = folder(tmp_path / "none", architectures=["XForCausalLM"], model_type="x")
    assert [show(str(path)).remote_code for path in (unknown, hub, both, none)] == [True, True, False, False]
    shown = swift("models", "show", unknown).ok().out
    assert "remote_code   needed: loading asks for --trust-remote-code" in shown
    assert swift("models", "show", unknown, "--json").ok().json()["remote_code"] is True


def test_the_familys_template_serves_only_a_folder_without_one(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", architectures=["Qwen3ForCausalLM"], model_type="qwen3")
    assert show(str(base)).template_id == "qwen"
    for name, text in (
        ("tokenizer_config.json", '{"chat_template": "x"}'), ("chat_template.jinja", "x"), ("chat_template.json", "{}"),
        ("processor_config.json", '{"chat_template": "x"}'),
    ):  # fmt: skip
        (base / name).write_text(text, encoding="utf-8")
        assert show(str(base)).template_id == "checkpoint"
        (base / name).unlink()
    (base / "tokenizer_config.json").write_text('{"chat_template": null}', encoding="utf-8")
    assert show(str(base)).template_id == "qwen"
    assert show("Qwen/Qwen3-8B-Base").template_id == "checkpoint"  # not here to be looked at


# --- the lists --------------------------------------------------------------------------------------------------------


def test_models_list_is_whole() -> None:
    rows = swift("models", "list", "--json").ok().json()
    found = [row for row in rows if row["kind"] == "checkpoint"]
    assert [(row["family"], row["id"]) for row in found] == [
        (family_of(c), row["id"]) for c in registry().all("models") for row in registry().checkpoints(c)
    ]
    assert all({"id", "family", "plugin", "architecture", "capabilities", "remote_code"} <= set(row) for row in found)
    assert {row["kind"] for row in rows} == {"loader", "model", "family", "checkpoint"}


def test_models_list_in_words() -> None:
    lines = swift("models", "list").ok().out.splitlines()
    total = sum(len(table(family)) for family in FAMILIES)
    assert lines[-1] == f"{total:,} checkpoints of {len(FAMILIES)} families: list them with --checkpoints or --family F"
    assert re.search(rf"^qwen +{len(table('qwen'))} +swift-plugin-qwen +Qwen of Alibaba", "\n".join(lines), re.MULTILINE)
    assert len(swift("models", "list", "--checkpoints").ok().out.splitlines()) == 1 + total
    one = swift("models", "list", "--family", "grok").ok().out.splitlines()
    assert one[1].split() == ["hpcai-tech/grok-1", "grok", "Grok1ModelForCausalLM", "text"]
    wrong = swift("models", "list", "--family", "qwem")
    assert (wrong.code, wrong.error.split(" Installed")[0]) == (2, "no family 'qwem' is installed. Did you mean: qwen?")


def test_show_tells_what_is_known_of_a_checkpoint() -> None:
    shown = swift("models", "show", "openbmb/MiniCPM-V-2_6", "--json").ok().json()
    assert (shown["family"], shown["architecture"], shown["remote_code"]) == ("minicpm", "MiniCPMV", True)
    assert shown["requires"] == ["timm", "transformers>=4.36", "decord"]
    assert shown["capabilities"] == ["text", "image", "video"]
    assert shown["traps"]
    unknown = swift("models", "show", "no-such-owner/no-such-model", "--json").ok().json()
    assert (unknown["family"], unknown["remote_code"], unknown["plugin"]) == (None, None, "swift-plugin-transformers")
    assert "Did you mean: Qwen/Qwen3-0.6B? Installed" in swift("models", "show", "qwen3-0.6b").error


def test_a_folder_is_said_to_do_what_all_of_its_architecture_do(tmp_path: Path) -> None:
    for architecture, expected in (("LlamaForCausalLM", ["text"]), ("LlavaForConditionalGeneration", ["text", "image"])):
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
        assert swift("models", "show", str(tmp_path), "--json").ok().json()["capabilities"] == expected


def test_listing_them_all_is_cheap() -> None:
    """CPU time, user and system, of `models list --json`: the best of some tries, as the machine may be busy."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("COV_", "COVERAGE_", "PYTHON"))}
    command = [
        sys.executable,
        "-c",
        "import sys; from swift_core.cli.main import run; sys.exit(run(['models', 'list', '--json'], debug=False))",
    ]
    best = 1.0
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=env)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    print(f"models list --json: {best:.3f} s of CPU")
    assert best < CPU_SECONDS


# --- two plugins for one architecture ---------------------------------------------------------------------------------


def other(tmp_path: Path, extra: str) -> Registry:
    """The installed plugins and one more, which claims LlamaForCausalLM too."""
    package = tmp_path / "site" / "swift_plugin_other"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    head = 'name = "swift-plugin-other"\napi = "0.9"\nsummary = "other"\n[[models]]\nid = "other"\n'
    (package / "swift_plugin.toml").write_text(f'{head}architectures = ["LlamaForCausalLM", "XForCausalLM"]\n{extra}')
    info = package.parent / "swift_plugin_other-1.0.dist-info"
    info.mkdir()
    (info / "entry_points.txt").write_text("[swift.manifest]\nother = swift_plugin_other:swift_plugin.toml\n")
    return Registry(build_index([str(package.parent), *sys.path]))


def test_two_families_of_an_architecture_are_told_apart_by_the_provider(tmp_path: Path) -> None:
    both, model = other(tmp_path, 'template = "mine"\n'), str(folder(tmp_path / "m", architectures=["LlamaForCausalLM"]))
    with pytest.raises(RequestError) as caught:
        resolve_model(both, Component(model))
    assert "is offered by swift-plugin-llama 0.1.0 and by swift-plugin-other 1.0; choose with model.provider=NAME" in str(
        caught.value
    )
    for provider, template in (("llama", "llama"), ("other", "mine")):
        ref = resolve_model(both, Component(model, provider))
        assert ref.family
        assert (family_of(ref.family), ref.loader.id, ref.template_id) == (provider, "transformers", template)


def test_two_families_that_say_the_same_need_no_choice(tmp_path: Path) -> None:
    manifest = tomllib.loads(FAMILIES["llama"].plugin.manifest.path.read_text(encoding="utf-8"))  # type: ignore[union-attr]
    parts = manifest["models"][0]["parts"]["projector"]
    both = other(tmp_path, f'template = "llama"\n[models.parts]\nprojector = {json.dumps(parts)}\n')
    ref = resolve_model(both, Component(str(folder(tmp_path / "m", architectures=["LlamaForCausalLM"]))))
    assert ref.family
    assert family_of(ref.family) == "llama"
