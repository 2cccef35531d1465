"""What every plugin of this repository keeps to: found in the plugins' folders, not in a list that one could forget."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from support import swift
from swift_core import __version__
from swift_core.api import KINDS
from swift_core.index import READY, build_index
from swift_core.manifest import Manifest, read_manifest
from swift_core.testing.contracts import run_walled

ROOT = Path(__file__).parent.parent
FOLDERS = sorted(path.parent for path in ROOT.glob("plugins/*/*/pyproject.toml"))
AREAS = {"models", "tuners", "trainers", "backends", "quantizers", "evaluators", "datasets", "commands", "rewards"}


def project(folder: Path) -> dict[str, object]:
    whole: dict[str, object] = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return whole


def package(folder: Path) -> Path:
    (found,) = (folder / "src").glob("swift_plugin_*")
    return found


def manifest(folder: Path) -> Manifest:
    return read_manifest(package(folder) / "swift_plugin.toml")


every = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}/{folder.name}")


def test_each_area_has_a_plugin() -> None:
    assert {folder.parent.name for folder in FOLDERS} == AREAS


@every
def test_is_installed_and_ready(folder: Path) -> None:
    name = str(project(folder)["name"])
    plugin = build_index().plugins[name]
    assert (plugin.status, plugin.reason) == (READY, "")
    assert plugin.manifest is not None
    assert plugin.manifest.path.resolve() == (package(folder) / "swift_plugin.toml").resolve(), "another copy is installed"


def test_all_can_be_imported_and_their_hooks_fit() -> None:
    faults = {row["name"]: row["fault"] for row in swift("plugins", "check", "--json").json()}
    assert {faults[str(project(folder)["name"])] for folder in FOLDERS} == {""}


@every
def test_names_and_versions_agree(folder: Path) -> None:
    found = project(folder)
    name = str(found["name"])
    assert name == manifest(folder).name == package(folder).name.replace("_", "-")
    assert found["version"] == __version__, "versions are lockstep over the repository"
    assert found["entry-points"]["swift.manifest"] == {  # type: ignore[index]
        name.removeprefix("swift-plugin-"): f"{package(folder).name}:swift_plugin.toml"
    }
    assert (found["readme"], found["license"], found["requires-python"]) == ("README.md", "Apache-2.0", ">=3.11")
    dependencies = list(found["dependencies"])  # type: ignore[call-overload]
    major, minor, _ = __version__.split(".")
    assert f"swift-core>={major}.{minor},<{major}.{int(minor) + 1}" in dependencies


@every
def test_declares_what_it_requires(folder: Path) -> None:
    """What a manifest's entries require is brought by the distribution's own dependencies."""
    from packaging.requirements import Requirement

    brought = {Requirement(text).name.lower() for text in project(folder)["dependencies"]}  # type: ignore[attr-defined]
    found = manifest(folder)
    required = {Requirement(text).name.lower() for entry in found.entries for text in (*entry.requires, *found.requires)}
    assert required <= brought


@every
def test_each_entry_says_what_it_is(folder: Path) -> None:
    assert manifest(folder).summary
    assert [entry.id for entry in manifest(folder).entries if not entry.summary] == []


@every
def test_has_its_files(folder: Path) -> None:
    name = str(project(folder)["name"])
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert readme.startswith(f"# {name}\n")
    assert f"pip install {name}" in readme or f"pip install swift-core {name}" in readme
    # a family that is data alone is tested with all the others, in tests/test_families.py
    assert list(folder.glob("tests/test_*.py")) or not list(package(folder).glob("[a-z]*.py"))
    assert (package(folder) / "__init__.py").read_text(encoding="utf-8").startswith('"""')


def test_no_two_test_files_share_a_name() -> None:
    places = ("tests", "kernel/tests", "plugins/*/*/tests", "examples/*/tests")
    names = [path.name for place in places for path in ROOT.glob(f"{place}/test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_what_is_imported_to_read_options_is_light() -> None:
    """Package, config and hooks of every plugin, where torch and its like cannot be imported."""
    names = []
    for folder in FOLDERS:
        inside = package(folder)
        names += [inside.name, *(f"{inside.name}.{part}" for part in ("config", "hooks") if (inside / f"{part}.py").exists())]
    run_walled("".join(f"importlib.import_module({name!r})\n" for name in names))


def test_the_kernel_knows_every_id() -> None:
    """known.toml, from which "not installed" names its pip command, and the manifests, in both directions."""
    known = tomllib.loads((ROOT / "kernel/src/swift_core/known.toml").read_text(encoding="utf-8"))
    offered: dict[str, dict[str, str]] = {}
    for folder in FOLDERS:
        for entry in manifest(folder).entries:
            offered.setdefault(entry.kind, {})[entry.id] = str(project(folder)["name"])
    assert known == offered


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "commands"])
def test_lists_show_what_the_manifests_offer(kind: str) -> None:
    expected = sorted(
        (entry.id, str(project(folder)["name"]))
        for folder in FOLDERS
        for entry in manifest(folder).entries
        if entry.kind == kind
    )
    shown = [row for row in swift(kind, "list", "--json").ok().json() if row.get("kind") != "checkpoint"]
    assert [(row["id"], row["plugin"]) for row in shown if row["plugin"] in {name for _, name in expected}] == expected
    text = swift(kind, "list").ok().out
    assert all(f"{ident} " in text for ident, _ in expected)


def test_each_option_has_a_type_and_a_help_text() -> None:
    schemas = {}
    for folder in FOLDERS:
        for entry in manifest(folder).entries:
            if entry.config:
                schemas[f"{entry.singular}:{entry.id}"] = swift("config", "schema", f"{entry.singular}:{entry.id}").ok().json()
    for address, schema in schemas.items():
        for name, option in schema.items():
            assert option["type"], f"{address}.{name}"
            assert option["help"], f"{address}.{name}"
