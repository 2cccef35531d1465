"""The index: found without being imported, one plugin's fault kept from the others, disabled, in conflict."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from swift_core import __version__
from swift_core.api import API, OLDEST, describe_mismatch, parse_api
from swift_core.index import BROKEN, READY, build_index, normalise, plugin_name

LORA = '[[tuners]]\nid = "lora"\n'
NEVER = 'raise AssertionError("must not be imported")\n'


@pytest.mark.parametrize(("name", "normal"), [("Swift_Plugin.Lora", "swift-plugin-lora"), ("a--b", "a-b"), ("x", "x")])
def test_normalise(name: str, normal: str) -> None:
    assert normalise(name) == normal


def test_plugin_name_takes_both_forms() -> None:
    assert plugin_name(" Lora ") == plugin_name("swift_plugin_lora") == "swift-plugin-lora"


def test_finds_a_plugin_and_imports_nothing(make_plugin: Callable[..., str]) -> None:
    folder = make_plugin("my-lora", LORA, NEVER, version="2.3")
    (Path(folder) / "swift_plugin_my_lora" / "__init__.py").write_text(NEVER)
    plugin = build_index([folder]).plugins["swift-plugin-my-lora"]
    assert (plugin.version, plugin.status, plugin.reason, plugin.package) == ("2.3", "READY", "", "swift_plugin_my_lora")
    assert [(entry.kind, entry.id) for entry in plugin.entries] == [("tuners", "lora")]
    assert "swift_plugin_my_lora" not in sys.modules


def test_the_path_given_is_the_one_that_is_read(make_plugin: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_plugin("lora", LORA)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != folder])
    assert build_index([folder]).plugins["swift-plugin-lora"].status == "READY"
    assert "swift-plugin-lora" not in build_index([]).plugins


def test_a_distribution_without_a_manifest_is_only_a_version(tmp_path: Path) -> None:
    (tmp_path / "Some_Thing-4.5.dist-info").mkdir()
    index = build_index([str(tmp_path)])
    assert (index.versions, index.plugins) == ({"some-thing": "4.5"}, {})


def test_the_first_on_the_path_wins(make_plugin: Callable[..., str], tmp_path: Path) -> None:
    folder = make_plugin("lora", LORA, version="1.0")
    shadowed = tmp_path / "later" / "swift_plugin_lora-9.0.dist-info"
    shadowed.mkdir(parents=True)
    assert build_index([folder, str(tmp_path / "later")]).versions["swift-plugin-lora"] == "1.0"


def test_a_folder_that_is_not_there_is_passed_over(tmp_path: Path) -> None:
    assert build_index([str(tmp_path / "none")]).plugins == {}


@pytest.mark.parametrize("disabled", ["lora", "swift-plugin-lora", "other, Swift_Plugin_LORA ,"])
def test_disabled_before_the_manifest_is_read(make_plugin: Callable[..., str], disabled: str) -> None:
    folder = make_plugin("lora", "not toml", NEVER)
    make_plugin("other2", LORA)
    index = build_index([folder], disabled)
    plugin = index.plugins["swift-plugin-lora"]
    assert (plugin.status, plugin.reason) == ("DISABLED", "switched off by SWIFT_DISABLE_PLUGINS")
    assert (plugin.usable, plugin.entries) == (False, ())
    assert index.plugins["swift-plugin-other2"].status == "READY"


def test_disabled_by_the_environment(make_plugin: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_plugin("lora", LORA)
    monkeypatch.setenv("SWIFT_DISABLE_PLUGINS", "lora")
    assert build_index([folder]).plugins["swift-plugin-lora"].status == "DISABLED"
    assert build_index([folder], disabled="").plugins["swift-plugin-lora"].status == "READY"


def test_one_broken_plugin_leaves_the_others(make_plugin: Callable[..., str]) -> None:
    folder = make_plugin("lora", LORA)
    make_plugin("bad", "[[tuner]]\n")
    plugins = build_index([folder]).plugins
    assert (plugins["swift-plugin-bad"].status, plugins["swift-plugin-lora"].status) == ("BROKEN", "READY")
    assert plugins["swift-plugin-bad"].reason == "unknown table [[tuner]]. Did you mean: tuners, trainers?"


def test_the_manifests_name_must_be_the_distributions(make_plugin: Callable[..., str]) -> None:
    folder = Path(make_plugin("lora", LORA))
    (folder / "swift_plugin_lora-1.0.dist-info").rename(folder / "swift_plugin_fork-1.0.dist-info")
    plugin = build_index([str(folder)]).plugins["swift-plugin-fork"]
    assert plugin.reason == "its manifest says name = 'swift-plugin-lora'; it must be the distribution's, 'swift-plugin-fork'"


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("swift_plugin_gone:swift_plugin.toml", "its package 'swift_plugin_gone' cannot be found"),
        ("swift_plugin_lora.sub:x.toml", "its manifest must sit in a top-level package, not in 'swift_plugin_lora.sub'"),
    ],
)
def test_an_entry_point_that_leads_nowhere(make_plugin: Callable[..., str], target: str, reason: str) -> None:
    folder = make_plugin("lora", LORA)
    (Path(folder) / "swift_plugin_lora-1.0.dist-info" / "entry_points.txt").write_text(f"[swift.manifest]\nlora = {target}\n")
    plugin = build_index([folder]).plugins["swift-plugin-lora"]
    assert (plugin.status, plugin.reason) == ("BROKEN", reason)


def test_other_entry_points_beside_ours(make_plugin: Callable[..., str]) -> None:
    folder = make_plugin("lora", LORA)
    text = "[console_scripts]\na = b:c\n\n[swift.manifest]\nlora = swift_plugin_lora:swift_plugin.toml\n\n[pytest11]\nx = y\n"
    (Path(folder) / "swift_plugin_lora-1.0.dist-info" / "entry_points.txt").write_text(text)
    assert build_index([folder]).plugins["swift-plugin-lora"].status == "READY"


def test_two_that_offer_one_id_are_in_conflict_and_usable(make_plugin: Callable[..., str]) -> None:
    make_plugin("lora", LORA)
    folder = make_plugin("fork", LORA, version="2.0")
    plugin = build_index([folder]).plugins["swift-plugin-lora"]
    assert (plugin.status, plugin.usable) == ("CONFLICT", True)
    assert plugin.reason == "tuner 'lora' is also offered by swift-plugin-fork 2.0; set tuner.provider"


def test_an_incompatible_claim_is_no_conflict(make_plugin: Callable[..., str]) -> None:
    make_plugin("lora", LORA)
    folder = make_plugin("fork", LORA, api="9.0")
    plugins = build_index([folder]).plugins
    assert (plugins["swift-plugin-lora"].status, plugins["swift-plugin-fork"].status) == ("READY", "INCOMPATIBLE")


def test_parse_api() -> None:
    assert parse_api("0.10") == (0, 10) > (0, 9)
    for text in ("1", "1.x", "1.2.3", ""):
        with pytest.raises(ValueError, match=r"api must read MAJOR\.MINOR"):
            parse_api(text)


@pytest.mark.parametrize("api", [API, OLDEST])
def test_an_api_in_the_range_is_taken(api: tuple[int, int]) -> None:
    assert describe_mismatch("p", "1.0", api, __version__) is None


@pytest.mark.parametrize(
    ("api", "upgrade"), [((API[0], API[1] + 1), "swift-core"), ((API[0] + 1, 0), "swift-core"), ((0, 0), "p")]
)
def test_an_api_outside_names_what_to_upgrade(api: tuple[int, int], upgrade: str) -> None:
    assert describe_mismatch("p", "1.0", api, "0.1.0") == (
        f"p 1.0 was made for plugin API {api[0]}.{api[1]}; swift-core 0.1.0 speaks {API[0]}.{API[1]}. "
        f"Upgrade: pip install -U {upgrade}"
    )


def test_a_package_shadowed_by_a_module_is_found_as_import_finds_it(make_plugin: Callable[..., str], tmp_path: Path) -> None:
    folder = make_plugin("lora", '[[tuners]]\nid = "lora"')
    assert build_index([folder]).plugins["swift-plugin-lora"].status == READY
    first = tmp_path / "first"
    first.mkdir()
    (first / "swift_plugin_lora.py").write_text("")
    plugin = build_index([str(first), folder]).plugins["swift-plugin-lora"]
    assert (plugin.status, plugin.reason) == (BROKEN, "its package 'swift_plugin_lora' cannot be found")


def test_a_folder_without_init_leaves_the_package_to_a_later_one(make_plugin: Callable[..., str], tmp_path: Path) -> None:
    folder = make_plugin("lora", '[[tuners]]\nid = "lora"')
    (tmp_path / "first" / "swift_plugin_lora").mkdir(parents=True)
    plugin = build_index([str(tmp_path / "first"), folder]).plugins["swift-plugin-lora"]
    assert plugin.status == READY
    assert plugin.manifest is not None
    assert plugin.manifest.path.parent.parent == Path(folder)
