"""The registry: who offers an id, who loads an architecture, and what to do when nobody, somebody broken, or two do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from swift_core.config import Component
from swift_core.errors import PluginLoadError, RequestError
from swift_core.index import PluginIndex, build_index
from swift_core.models import resolve_model
from swift_core.registry import Contribution, Registry, check_requires, plugin_faults, read_model_config

LORA = '[[tuners]]\nid = "lora"\n'


def lack(registry: Registry, kind: str, ident: str, provider: str | None = None) -> str:
    with pytest.raises(RequestError) as caught:
        registry.find(kind, ident, provider)
    return str(caught.value)


def first(folder: str) -> Contribution:
    plugin = next(iter(build_index([folder]).plugins.values()))
    return Contribution(plugin.entries[0], plugin)


def test_finds_and_addresses(make_plugin: Callable[..., str]) -> None:
    registry = Registry(build_index([make_plugin("lora", LORA)]))
    found = registry.find("tuners", "lora")
    assert (found.id, found.address, found.plugin.name) == ("lora", "tuner.lora", "swift-plugin-lora")
    assert (registry.has("tuners", "lora"), registry.has("trainers", "lora")) == (True, False)


def test_all_are_sorted_by_id(make_plugin: Callable[..., str]) -> None:
    make_plugin("a", '[[tuners]]\nid = "zeta"\n[[tuners]]\nid = "beta"\n')
    folder = make_plugin("b", '[[tuners]]\nid = "gamma"\n[[trainers]]\nid = "alpha"\n')
    assert [c.id for c in Registry(build_index([folder])).all("tuners")] == ["beta", "gamma", "zeta"]


def test_nothing_installed_names_the_distribution_that_has_it() -> None:
    assert lack(Registry(PluginIndex()), "tuners", "lora") == (
        "tuner 'lora' is not installed. Get it: pip install swift-plugin-lora"
    )


def test_a_misspelt_id_is_guessed_from_what_is_installed_and_what_is_known(make_plugin: Callable[..., str]) -> None:
    registry = Registry(build_index([make_plugin("mine", '[[tuners]]\nid = "lorax"\n')]))
    assert lack(registry, "tuners", "lroa") == "no tuner 'lroa'. Did you mean: lora, lorax? Installed: lorax."
    assert (
        lack(Registry(PluginIndex()), "datasets", "zzz") == "no dataset 'zzz'. Installed: none (see swift-core datasets list)."
    )


def test_an_incompatible_plugin_is_named_with_its_reason(make_plugin: Callable[..., str]) -> None:
    registry = Registry(build_index([make_plugin("lora", LORA, api="9.0")]))
    with pytest.raises(PluginLoadError) as caught:
        registry.find("tuners", "lora")
    assert str(caught.value).startswith(
        "tuner 'lora' comes from swift-plugin-lora 1.0, which is installed but INCOMPATIBLE: swift-plugin-lora 1.0 was made for"
    )


@pytest.mark.parametrize(("table", "status"), [("not toml", "BROKEN: swift_plugin.toml is not valid TOML"), ("", "DISABLED")])
def test_a_plugin_whose_manifest_is_not_read_is_known_by_its_name(
    make_plugin: Callable[..., str], table: str, status: str
) -> None:
    registry = Registry(build_index([make_plugin("lora", table)], disabled="" if table else "lora"))
    assert f"comes from swift-plugin-lora 1.0, which is installed but {status}" in lack(registry, "tuners", "lora")


def test_two_providers(make_plugin: Callable[..., str]) -> None:
    make_plugin("lora", LORA)
    registry = Registry(build_index([make_plugin("fork", LORA, version="2.0")]))
    assert lack(registry, "tuners", "lora") == (
        "tuner 'lora' is offered by swift-plugin-fork 2.0 and by swift-plugin-lora 1.0; "
        "choose with tuner.provider=NAME, or uninstall one."
    )
    for provider in ("fork", "swift-plugin-fork", "Swift_Plugin_Fork"):
        assert registry.find("tuners", "lora", provider).plugin.version == "2.0"
    assert lack(registry, "tuners", "lora", "other") == (
        "tuner 'lora' has no provider 'other'. Providers installed: swift-plugin-fork 2.0, swift-plugin-lora 1.0."
    )


def test_loading_goes_to_the_family_that_claims_it_and_else_to_the_generic_loader(make_plugin: Callable[..., str]) -> None:
    make_plugin("any", '[[models]]\nid = "any"\ngeneric = true\n')
    make_plugin("listed", '[[models]]\nid = "listed"\narchitectures = ["A", "B"]\n')
    registry = Registry(build_index([make_plugin("own", '[[models]]\nid = "own"\narchitectures = ["A"]\nloads = true\n')]))
    assert [registry.loader(architecture).id for architecture in ("A", "B", None)] == ["own", "any", "any"]
    assert registry.loader("A", "any").id == "any"
    families = [registry.family(architecture) for architecture in ("B", "C")]
    assert [family and family.id for family in families] == ["listed", None]


def test_two_that_load_one_architecture(make_plugin: Callable[..., str]) -> None:
    make_plugin("one", '[[models]]\nid = "one"\narchitectures = ["A"]\nloads = true\n')
    registry = Registry(build_index([make_plugin("two", '[[models]]\nid = "two"\narchitectures = ["A"]\nloads = true\n')]))
    with pytest.raises(RequestError) as caught:
        registry.loader("A")
    assert str(caught.value) == (
        "model of architecture 'A' is offered by swift-plugin-one 1.0 and by swift-plugin-two 1.0; "
        "choose with model.provider=NAME, or uninstall one."
    )
    assert registry.loader("A", "two").id == "two"


def test_without_a_generic_loader_the_known_one_is_named() -> None:
    for kind, dist in (("models", "swift-plugin-transformers"), ("datasets", "swift-plugin-huggingface")):
        with pytest.raises(RequestError, match=f"is not installed. Get it: pip install {dist}$"):
            Registry(PluginIndex()).generic(kind)


def test_checkpoints_are_read_from_the_file_beside_the_manifest(make_plugin: Callable[..., str]) -> None:
    folder = make_plugin("own", '[[models]]\nid = "own"\narchitectures = ["A"]\ncheckpoints = "checkpoints.toml"\n')
    rows = '[[checkpoints]]\nid = "org/one"\n[[checkpoints]]\nid = "org/two"\narchitecture = "B"\n'
    (Path(folder) / "swift_plugin_own" / "checkpoints.toml").write_text(rows)
    registry = Registry(build_index([folder]))
    found = registry.checkpoint("org/two")
    assert found is not None
    assert (found[0].id, found[1]) == ("own", {"id": "org/two", "architecture": "B"})
    assert registry.checkpoint("org/three") is None


def test_a_table_may_be_json_lines_and_is_asked_by_either_name(make_plugin: Callable[..., str]) -> None:
    folder = make_plugin("own", '[[models]]\nid = "own"\nmodel_types = ["a"]\ncheckpoints = "checkpoints.jsonl"\n')
    rows = '{"id":"org/one","modelscope":"other/one"}\n{"id":"org/two","architecture":"B"}\n'
    (Path(folder) / "swift_plugin_own" / "checkpoints.jsonl").write_text(rows)
    registry = Registry(build_index([folder]))
    assert [row["id"] for row in registry.checkpoints(registry.all("models")[0])] == ["org/one", "org/two"]
    for name, row in (("other/one", "org/one"), ("org/two", "org/two")):
        found = registry.checkpoint(name)
        assert found is not None
        assert found[1]["id"] == row
    assert registry.checkpoint("org/t") is None
    (Path(folder) / "swift_plugin_own" / "checkpoints.jsonl").unlink()
    with pytest.raises(RequestError, match=r"the table checkpoints\.jsonl of swift-plugin-own cannot be read"):
        registry.checkpoint("org/one")


def test_an_architecture_goes_before_a_model_type(make_plugin: Callable[..., str]) -> None:
    make_plugin("one", '[[models]]\nid = "one"\narchitectures = ["A"]\nmodel_types = ["a"]\n')
    registry = Registry(
        build_index([make_plugin("two", '[[models]]\nid = "two"\narchitectures = ["B"]\nmodel_types = ["b"]\n')])
    )
    for architecture, model_type, expected in (("A", "b", "one"), ("X", "b", "two"), (None, "a", "one"), ("X", "x", None)):
        family = registry.family(architecture, model_type)
        assert (family.id if family else None) == expected


def test_families_that_differ_must_be_chosen_between(make_plugin: Callable[..., str]) -> None:
    make_plugin("one", '[[models]]\nid = "one"\narchitectures = ["A", "B"]\n')
    two = '[[models]]\nid = "two"\narchitectures = ["A"]\n[[models]]\nid = "three"\narchitectures = ["B"]\ntemplate = "t"\n'
    registry = Registry(build_index([make_plugin("two", two)]))
    alike = registry.family("A")
    assert alike is not None
    assert alike.id == "one"
    with pytest.raises(
        RequestError, match=r"by swift-plugin-one .* and by swift-plugin-two .*; choose with model\.provider=NAME"
    ):
        registry.family("B")
    for provider, expected in (("two", "three"), ("swift-plugin-one", "one"), ("another", "one")):
        family = registry.family("B", provider=provider)
        assert family is not None
        assert family.id == expected


@pytest.mark.parametrize(
    ("requires", "reason"),
    [
        ("click", None),
        ("click>=8", None),
        ("click>=99; python_version < '3'", None),
        ("nothing-like-it", "it needs nothing-like-it, which is not installed. Get it: pip install 'nothing-like-it'"),
        ("not a requirement!", "its manifest has an unreadable requirement, 'not a requirement!'"),
    ],
)
def test_requirements_are_checked_against_metadata(make_plugin: Callable[..., str], requires: str, reason: str | None) -> None:
    contribution = first(make_plugin("x", f'[[tuners]]\nid = "x"\nrequires = ["{requires}"]\n'))
    assert check_requires(contribution) == reason
    assert plugin_faults(contribution.plugin) == (f"tuner 'x': {reason}" if reason else "")


def test_a_version_that_is_too_old_is_named(make_plugin: Callable[..., str]) -> None:
    from importlib.metadata import version

    contribution = first(make_plugin("x", '[[tuners]]\nid = "x"\nrequires = ["click>=99"]\n'))
    assert check_requires(contribution) == (
        f"it needs click>=99, and {version('click')} is installed. Get it: pip install 'click>=99'"
    )


def test_suggestions_name_each_distribution_once() -> None:
    names = ("supervised", "heads", "distill", "ppo", "grpo", "preference")
    assert Registry(PluginIndex()).suggestions("trainers") == [f"swift-plugin-{name}" for name in names]
    assert Registry(PluginIndex()).suggestions("callbacks") == []


@pytest.mark.parametrize(
    ("config", "architecture"),
    [({"architectures": ["A", "B"]}, "A"), ({"architectures": []}, None), ({"architectures": None}, None), ({}, None)],
)
def test_architecture(
    make_plugin: Callable[..., str], tmp_path: Path, config: dict[str, Any], architecture: str | None
) -> None:
    registry = Registry(build_index([make_plugin("x", '[[models]]\nid = "any"\ngeneric = true\n')]))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert resolve_model(registry, Component(str(tmp_path))).architecture == architecture


def test_a_folder_without_a_readable_config(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"holds no config.json: it is not a model folder\.$"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RequestError, match=r"config.json cannot be read: Expecting property name"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(RequestError, match=r"config.json must hold a JSON object, not list"):
        read_model_config(tmp_path)
    for names in ("LlamaForCausalLM", [5]):
        (tmp_path / "config.json").write_text(json.dumps({"architectures": names}))
        with pytest.raises(RequestError, match=r"config.json: architectures must be a list of class names, not "):
            read_model_config(tmp_path)
