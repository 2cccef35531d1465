"""`swift-core plugin new`: what it writes is sound, and the contracts find what is broken in it.

The slow tests install a plugin of every kind, as it is written and with one fault each, and run all their tests once.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from support import swift, swift_process
from swift_core import __version__
from swift_core.api import KINDS
from swift_core.cli.scaffold import render, write_plugin
from swift_core.errors import RequestError
from swift_core.manifest import read_manifest

LONGEST = "a-name-of-the-greatest-length0"

FAULTS = [
    ("model", "model", "model.to(device).eval()", "model.to(device).train()", "test_loads_in_eval_mode"),
    ("template", "template", " if answer and ", " if ", "test_trains_exactly_the_answer"),
    ("template", "template", "int(mask.sum())", "ids.numel()", "test_collates_and_packs"),
    ("tuner", "tuner", "if value.requires_grad}", 'if "input" in name}', "test_gradient_reaches_all_that_is_trained"),
    ("tuner", "tuner", "        self._put(values)\n", "        del values\n", "test_saves_and_loads"),
    ("tuner", "tuner", "        self._put(self.start)\n", "", "test_disabled_is_the_base"),
    ("tuner", "tuner", "return self.bundle", "return self._put(self.start) or self.bundle", "test_merged_equals_unmerged"),
    ("trainer", "trainer", '                "step",\n', '                "tick",\n', "test_fits_and_reports"),
    ("trainer", "trainer", '            "peak_bytes": backend.peak_bytes(),\n', "", "test_fits_and_reports"),
    ("backend", "backend", "        self.optimizer.step()\n", "", "test_trains"),
    ("backend", "launcher", "from swift_core", "import torch\nfrom swift_core", "test_launches_without_torch"),
    ("engine", "engine", "list(whole[", "list(__import__('os').urandom(4)[", "test_generates"),
    ("engine", "engine", "(len(ids) - 1)", "len(ids)", "test_scores_tokens"),
    ("engine", "config", '"answer in capital letters"', '""', "test_options_have_help"),
    ("quantizer", "quantizer", "dequantize(codes, scales).to(layer.weight)", "layer.weight.data", "test_quantizes_and_saves"),
    ("quantizer", "quantizer", '"quant_method": "', '"quant_method": "x', "test_quantizes_and_saves"),
    ("evaluator", "evaluator", "found / len(rows)", 'found * float("nan")', "test_reports"),
    ("dataset", "dataset", "random.Random(self.config.seed)", "random.Random()", "test_gives_the_same_standard_rows_twice"),
    ("dataset", "hooks", "if dataset_id ==", "if dataset_id or", "test_answers_its_id_only"),
    ("dataset", "hooks", "from typing", "import numpy\nfrom typing", "test_imports_nothing_heavy"),
    ("part", "part", "len(left & right) / ", "2 * len(left & right) / ", "test_keeps_to_its_protocol"),
    ("part", "hooks", "@hookimpl\n", "", "test_hooks_are_marked"),
    ("callback", "hooks", "if component.name ==", "if component.name or", "test_follows_a_run_that_names_it"),
    ("callback", "callback", "            return\n", "            raise\n", "test_follows_a_run_that_names_it"),
    ("command", "swift_plugin.toml", "command:command", "command:count", "test_helps"),
    ("command", "test", "(CommandContract):\n", "(CommandContract):\n    def test_helps(self): ...\n\n", "test_no_overrides"),
]
"""kind, module, what is replaced, with what, the contract's test that must fail."""


def wrong(name: str, kind: str, folder: Path) -> str:
    with pytest.raises(RequestError) as caught:
        write_plugin(name, kind, folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS.values())
def test_files(kind: str, tmp_path: Path) -> None:
    folder = write_plugin("my-own", kind, tmp_path / "out")
    package = folder / "src" / "swift_plugin_my_own"
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    common = {"pyproject.toml", "README.md", "tests/test_my_own.py"}
    hooks = set() if kind == "command" else {"src/swift_plugin_my_own/config.py", "src/swift_plugin_my_own/hooks.py"}
    own = {f"src/swift_plugin_my_own/{name}" for name in ("__init__.py", "swift_plugin.toml", f"{kind}.py")}
    assert written - {"src/swift_plugin_my_own/launcher.py"} == common | hooks | own
    manifest = read_manifest(package / "swift_plugin.toml")
    (entry,) = manifest.entries
    assert (manifest.name, entry.singular) == ("swift-plugin-my-own", kind)
    assert entry.id == ("metric/my-own" if kind == "part" else "my-own")
    assert not any("$" in path.read_text(encoding="utf-8") for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", KINDS.values())
def test_pyproject(kind: str) -> None:
    project = tomllib.loads(render("my-own", kind)["pyproject.toml"])["project"]
    assert project["name"] == "swift-plugin-my-own"
    assert project["entry-points"]["swift.manifest"] == {"my-own": "swift_plugin_my_own:swift_plugin.toml"}
    assert project["dependencies"][0] == "swift-core>=0.1,<0.2"


def test_ruff_is_content_with_every_kind_under_any_name(tmp_path: Path) -> None:
    for name in ("my-own", "x", LONGEST):
        for kind in KINDS.values():
            write_plugin(name, kind, tmp_path / f"{name}-{kind}")
    for command in (("check", "--no-cache"), ("format", "--check", "--no-cache")):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, tmp_path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_the_tuner_is_short() -> None:
    lines = render("x", "tuner")["src/swift_plugin_x/tuner.py"].partition("class PatternTuned")[2].splitlines()
    code = [line for line in lines[1:] if line.strip() and not line.strip().startswith(('"""', "#"))]
    assert len(code) < 40


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "near"),
    [("My_Tuner", "my-tuner"), ("my--tuner", "my-tuner"), ("4bit", "bit"), ("-x-", "x"), ("a b/c", "a-b-c"), ("ä", None)],
)
def test_a_name_that_is_none(name: str, near: str | None, tmp_path: Path) -> None:
    hint = f" Did you mean: {near}?" if near else ""
    assert wrong(name, "tuner", tmp_path / "out") == (
        f"{name!r} cannot name a plugin: use at most 30 lower-case letters, digits and single hyphens, a letter first.{hint}"
    )
    assert not (tmp_path / "out").exists()


def test_the_prefix_may_be_written(tmp_path: Path) -> None:
    write_plugin("swift-plugin-mine", "dataset", tmp_path / "out")
    assert (tmp_path / "out" / "src" / "swift_plugin_mine").is_dir()


def test_a_kind_that_is_none(tmp_path: Path) -> None:
    assert wrong("x", "tunner", tmp_path) == "--kind: no kind 'tunner'. Did you mean: tuner, trainer?"
    assert wrong("x", "zzz", tmp_path) == f"--kind: no kind 'zzz'. Kinds: {', '.join(KINDS.values())}."


def test_a_folder_that_holds_something(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert wrong("x", "tuner", tmp_path) == f"{tmp_path} exists already; choose another name or --output"
    assert wrong("x", "tuner", tmp_path / "file") == f"{tmp_path / 'file'} exists already; choose another name or --output"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_plugin_that_is_installed(tmp_path: Path) -> None:
    assert (
        wrong("lora", "tuner", tmp_path / "x") == f"swift-plugin-lora {__version__} is installed already; choose another name"
    )


# --- the command ------------------------------------------------------------------------------------------------------


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = swift("plugin", "new", "mine", "--kind", "dataset").ok()
    assert result.out.splitlines()[0] == "wrote swift-plugin-mine"
    assert (tmp_path / "swift-plugin-mine" / "src" / "swift_plugin_mine" / "dataset.py").is_file()
    assert swift("plugin", "new", "mine", "--kind", "dataset").error == (
        "swift-plugin-mine exists already; choose another name or --output"
    )
    swift("plugin", "new", "mine", "--kind", "dataset", "--output", "elsewhere").ok()
    assert (tmp_path / "elsewhere" / "pyproject.toml").is_file()


def test_a_wrong_command_exits_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = swift("plugin", "new", "Mine", "--kind", "tuner")
    assert (result.code, result.error.endswith("Did you mean: mine?")) == (2, True)
    assert list(tmp_path.iterdir()) == []


# --- what is written works, and its contract finds faults -------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every kind's plugin `sound-KIND`, and `fault-N` for each of FAULTS, built and installed."""
    folder = tmp_path_factory.mktemp("plugins")
    projects = [write_plugin(f"sound-{kind}", kind, folder / f"sound-{kind}") for kind in KINDS.values()]
    for number, (kind, module, old, new, _) in enumerate(FAULTS):
        project = write_plugin(f"fault-{number}", kind, folder / f"fault-{number}")
        package = project / "src" / f"swift_plugin_fault_{number}"
        file = (
            package / (module if "." in module else f"{module}.py")
            if module != "test"
            else project / "tests" / f"test_fault_{number}.py"
        )
        before, found, after = file.read_text(encoding="utf-8").rpartition(old)
        assert found, f"{file.name} of {kind} no longer holds {old!r}"
        file.write_text(before + new + after, encoding="utf-8")
        projects.append(project)
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", folder / "site"]
    subprocess.run([*command, *projects], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def outcomes(site: Path) -> dict[str, dict[str, bool]]:
    """For each plugin, its tests by `CLASS.NAME` and whether they passed."""
    env = os.environ | {"PYTHONPATH": str(site / "site"), "OMP_NUM_THREADS": "1"}
    (site / "pytest.ini").write_text("[pytest]\n")  # one for all, in place of each plugin's own
    options = [
        "-q",
        "-c",
        "pytest.ini",
        "-p",
        "no:cacheprovider",
        "--import-mode=importlib",
        "--junitxml=report.xml",
        "-W",
        "ignore",
    ]
    tests = [str(path) for path in sorted(site.glob("*/tests/test_*.py"))]
    done = subprocess.run([sys.executable, "-m", "pytest", *options, *tests], cwd=site, env=env, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout  # the faults fail
    found: dict[str, dict[str, bool]] = {}
    for case in ElementTree.parse(site / "report.xml").iter("testcase"):
        module, _, cls = str(case.get("classname")).rpartition("test_")[2].partition(".")
        name = f"{cls}.{case.get('name')}"
        found.setdefault(module.replace("_", "-"), {})[name] = not case.findall("failure") + case.findall("error")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS.values())
def test_a_new_plugin_passes_all_its_tests(kind: str, outcomes: dict[str, dict[str, bool]]) -> None:
    tests = outcomes[f"sound-{kind}"]
    assert len([name for name in tests if name.startswith("TestContract.")]) >= 5
    assert [name for name, passed in tests.items() if not passed] == []


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(FAULTS)), ids=[f"{fault[0]}-{fault[4]}" for fault in FAULTS])
def test_the_contract_finds_the_fault(number: int, outcomes: dict[str, dict[str, bool]]) -> None:
    failed = [name for name, passed in outcomes[f"fault-{number}"].items() if not passed]
    assert f"TestContract.{FAULTS[number][4]}" in failed


@pytest.mark.slow
def test_new_plugins_pass_the_check_of_installed_ones(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(site / "site"))
    result = swift_process("plugins", "check", *(f"sound-{kind}" for kind in KINDS.values())).ok()
    assert [" 0.1.0: ok" in line for line in result.out.splitlines()] == [True] * len(KINDS)
