"""Every distribution builds to a wheel that holds what it needs, and a bare installation says what to install next."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import Result
from swift_core import __version__

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PROJECTS = [
    ROOT / "kernel",
    *sorted(path.parent for path in (*ROOT.glob("plugins/*/*/pyproject.toml"), *ROOT.glob("examples/*/pyproject.toml"))),
]
KINDS = (
    "models", "templates", "tuners", "trainers", "backends", "engines", "quantizers", "evaluators", "datasets", "parts",
    "callbacks", "plugins",
)  # fmt: skip


@dataclass
class Bare:
    """A virtual environment of its own, and the folder of wheels to install into it."""

    bin: Path
    wheels: Path

    def pip(self, *args: object) -> None:
        command = [self.bin / "python", "-m", "pip", "-q", "--disable-pip-version-check", *args]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def install(self, name: str) -> None:
        """Without its dependencies: no plugin's code is imported here."""
        (wheel,) = self.wheels.glob(f"{name.replace('-', '_')}-*.whl")
        self.pip("install", "--no-deps", wheel)

    def swift(self, *args: object) -> Result:
        done = subprocess.run([self.bin / "swift-core", *map(str, args)], capture_output=True, text=True, cwd=self.wheels)
        return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, *PROJECTS]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def bare(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Bare:
    """swift-core alone, its dependencies from the package index."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=True)
    made = Bare(folder / "bin", wheels)
    made.pip("install", next(wheels.glob("swift_core-*.whl")))
    return made


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_every_distribution_is_a_wheel(wheels: Path) -> None:
    found = {path.name.partition("-")[0] for path in wheels.glob("*.whl")}
    pattern = re.compile(r'^name = "(.+)"$', re.MULTILINE)
    declared = {pattern.findall((project / "pyproject.toml").read_text(encoding="utf-8"))[0] for project in PROJECTS}
    assert found == {name.replace("-", "_") for name in declared}


@pytest.mark.parametrize("project", PROJECTS, ids=lambda project: project.name)
def test_a_wheel_holds_every_file_of_its_package(project: Path, wheels: Path) -> None:
    (package,) = (path for path in (project / "src").iterdir() if not path.name.startswith("."))
    (wheel,) = wheels.glob(f"{package.name}-*.whl")
    files = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {str(path.relative_to(project / "src")) for path in files} == {
        name for name in names(wheel) if not name.startswith(f"{wheel.name.rsplit('-', 3)[0]}.dist-info")
    }


def test_with_the_kernel_alone_every_list_says_what_to_install(bare: Bare) -> None:
    for kind in KINDS:
        result = bare.swift(kind, "list").ok()
        assert re.match(rf"no {kind} installed\. (Install|Write) ", result.out), result.out
        assert len(result.out.splitlines()) == 1
        assert json.loads(bare.swift(kind, "list", "--json").ok().out) == []


def test_a_hint_names_a_wheel_that_is_here(bare: Bare) -> None:
    built = {path.name.partition("-")[0].replace("_", "-") for path in bare.wheels.glob("*.whl")}
    hints = " ".join(bare.swift(kind, "list").out for kind in KINDS)
    assert set(re.findall(r"swift-plugin-[a-z0-9-]+", hints)) <= built


def test_the_kernel_alone_brings_no_heavy_library(bare: Bare) -> None:
    listed = subprocess.run([bare.bin / "python", "-m", "pip", "list", "--format=json"], capture_output=True, text=True)
    found = {row["name"].lower() for row in json.loads(listed.stdout)}
    assert {"swift-core", "pluggy", "click", "rich", "pyyaml"} <= found
    assert not found & {"torch", "transformers", "numpy", "peft", "datasets"}


def test_plugins_come_and_go(bare: Bare) -> None:
    bare.install("swift-plugin-identity")
    bare.install("swift-plugin-echo")
    try:
        assert [row["id"] for row in json.loads(bare.swift("datasets", "list", "--json").out)] == ["identity"]
        assert [row["id"] for row in json.loads(bare.swift("engines", "list", "--json").out)] == ["echo"]
        checked = bare.swift("plugins", "check").ok().out.splitlines()
        assert checked == [f"swift-plugin-{name} {__version__}: ok" for name in ("echo", "identity")]
    finally:
        bare.pip("uninstall", "-y", "swift-plugin-identity", "swift-plugin-echo")
    assert bare.swift("datasets", "list").out.startswith("no datasets installed.")
    assert bare.swift("engines", "list").out.startswith("no engines installed.")


def test_train_names_each_plugin_that_it_lacks_until_none_is_missing(bare: Bare, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    asked: list[str] = []
    while True:
        result = bare.swift("train", "--model", tmp_path, "--dataset", "rows.jsonl")
        assert result.code == 2
        named = re.search(r" is not installed\. Get it: pip install (swift-plugin-\S+)$", result.error)
        if named is None:
            break
        assert named[1] not in asked
        asked.append(named[1])
        bare.install(named[1])
    try:
        expected = ["transformers", "lora", "supervised", "torch"]
        assert sorted(asked) == sorted(f"swift-plugin-{name}" for name in expected)
        assert re.search(r"it needs (\S+), which is not installed\. Get it: pip install '\1'$", result.error), result.error
    finally:
        bare.pip("uninstall", "-y", *asked)


@pytest.mark.parametrize("command", ["infer", "chat", "eval", "quantize", "export"])
def test_a_command_that_is_not_here_names_its_plugin(bare: Bare, command: str) -> None:
    result = bare.swift(command, "--help")
    expected = f"command {command!r} is not installed. Get it: pip install swift-plugin-use"
    assert (result.code, result.error) == (2, expected)
    assert f"  {command} " not in bare.swift("--help").ok().out


def test_commands_come_and_go(bare: Bare) -> None:
    bare.install("swift-plugin-use")
    try:
        assert "  infer     Answer the rows of a file into a file; resumable." in bare.swift("--help").ok().out
        assert bare.swift("infer", "--help").ok().out.startswith("Usage: swift-core infer ")
    finally:
        bare.pip("uninstall", "-y", "swift-plugin-use")
    assert "infer" not in bare.swift("--help").ok().out


def test_the_default_model_names_its_plugin(bare: Bare) -> None:
    result = bare.swift("train", "--dataset", "rows.jsonl")
    assert (result.code, result.error) == (
        2, "model 'smollm2-135m-instruct' is not installed. Get it: pip install swift-plugin-smollm"
    )  # fmt: skip


def test_a_new_plugin_installs_beside_the_kernel_alone(bare: Bare, tmp_path: Path) -> None:
    bare.swift("plugin", "new", "mine", "--kind", "dataset", "--output", tmp_path / "mine").ok()
    wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, tmp_path / "mine"]
    subprocess.run(list(map(str, wheel)), check=True, capture_output=True)
    bare.pip("install", next(tmp_path.glob("*.whl")))
    try:
        assert [row["id"] for row in json.loads(bare.swift("datasets", "list", "--json").out)] == ["mine"]
    finally:
        bare.pip("uninstall", "-y", "swift-plugin-mine")
