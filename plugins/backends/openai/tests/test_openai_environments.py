"""`backends install` and `backends environments`, on an engine whose environment needs nothing from an index."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from swift_core.errors import RequestError, RunError
from swift_plugin_openai.environments import MARK, home, install, mark_of, python_of, read_recipe


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
