"""`backends install` and `backends environments`, on an engine whose environment needs nothing from an index."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from swift_core.errors import RequestError, RunError
from swift_plugin_openai.environments import MARK, _run, home, install, mark_of, python_of, read_recipe


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plugin's folder whose requirements are empty."""
    monkeypatch.setenv("SWIFT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "environment.toml").write_text(
        'engine = "toy"\nmodule = "json"\n[cpu]\npackage = "pip"\nrequirements = "needs.txt"\nwhole = true\nmegabytes = 1\n'
    )
    (tmp_path / "needs.txt").write_text("# nothing\n")
    return tmp_path


def test_made_once_and_only_whole_ones_are_used(folder: Path) -> None:
    said: list[str] = []
    recipe = read_recipe(folder)
    with pytest.raises(
        RequestError, match=r"engine toy is not there\. Make it: swift-core backends install toy \(about 1 MB\)"
    ):
        python_of("toy", None, 1)
    made = install(recipe, sys.executable, said.append)
    assert made == home("toy")
    mark = mark_of("toy")
    assert mark is not None
    assert "pip" in mark["versions"]
    assert mark["bytes"] > 1e6
    assert python_of("toy", None, 1) == str(made / "bin" / "python")
    install(recipe, sys.executable, said.append)
    assert said[-1] == f"{made} is whole: nothing to do"
    (folder / "needs.txt").write_text("no-such-package-here @ file:///nowhere/at.whl\n")  # an update that fails
    with pytest.raises(RunError, match=r"needs\.txt cannot be installed: .* Run the command again to go on"):
        install(read_recipe(folder), sys.executable, said.append)
    assert not (made / MARK).exists()
    with pytest.raises(RequestError, match=r"engine toy is not whole\. Make it"):
        python_of("toy", None, 1)
    (folder / "needs.txt").write_text("# nothing\n")
    said.clear()
    install(read_recipe(folder), sys.executable, said.append)
    assert not any(line.startswith("making") for line in said), "what was begun is gone on with"
    assert json.loads((made / MARK).read_text())["device"] == "cpu"


def test_a_device_that_it_lacks(folder: Path) -> None:
    with pytest.raises(RequestError, match="toy has no environment for cuda"):
        read_recipe(folder, "cuda")


def test_what_pip_is_told_of_the_user_s_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where packages come from, and not where they would go."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.example/simple")
    monkeypatch.setenv("PIP_TARGET", "/elsewhere")
    script = "import json, os; print(json.dumps([name for name in os.environ if name.startswith('PIP_')]))"
    assert json.loads(_run([sys.executable, "-c", script], "it fails")) == ["PIP_INDEX_URL"]


def test_what_a_user_should_know_is_told(folder: Path) -> None:
    path = folder / "environment.toml"
    path.write_text(path.read_text() + 'told = "it is compiled: some minutes"\n')
    said: list[str] = []
    install(read_recipe(folder), sys.executable, said.append)
    assert said[1:3] == ["pip install -r needs.txt: 0 packages, about 1 MB in all", "  it is compiled: some minutes"]
