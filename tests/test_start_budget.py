"""What the commands that only read manifests may cost: no heavy import, few modules, little CPU time."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "peft", "accelerate", "pluggy", "rich", "datasets", "numpy", "pandas", "safetensors", "hqq"}

LISTS = (
    "models", "templates", "tuners", "trainers", "backends", "engines", "quantizers", "evaluators", "datasets", "parts",
    "callbacks",
)  # fmt: skip
COMMANDS = ["--help", "--version", "plugins list", "plugins list --json", *(f"{kind} list" for kind in LISTS)]

CEILINGS = {"--help": 78, "--version": 51, "plugins list": 150, "list": 73}
"""Modules imported beyond those of a bare interpreter (Python 3.11, the versions of constraints.txt).
These numbers may only go down."""

CPU_SECONDS = 0.2

PROBE = """
import sys
from swift_core.cli.main import run
code = run(sys.argv[1:], debug=False)
import json
print(json.dumps([code, sorted(sys.modules)]), file=sys.stderr)
"""


def modules(*args: str) -> tuple[int, set[str], float]:
    """Exit code, the modules left in memory, and the CPU seconds of a command in a fresh interpreter."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", PROBE, *args], capture_output=True, text=True, check=True, env=_env())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    code, names = json.loads(done.stderr.splitlines()[-1])
    return code, set(names), after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _env() -> dict[str, str]:
    """Without what a test runner's own tools switch on in every interpreter, such as coverage."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("COV_", "COVERAGE_", "PYTHON"))}


@pytest.fixture(scope="module")
def bare() -> set[str]:
    """Modules of an interpreter that does nothing but what the probe itself does."""
    code = "import sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_env())
    return set(json.loads(done.stdout))


@pytest.mark.parametrize("command", COMMANDS)
def test_imports_little_and_starts_fast(command: str, bare: set[str]) -> None:
    code, found, seconds = modules(*command.split())
    assert code == 0
    assert {name for name in found if name.partition(".")[0] in HEAVY or name.startswith("swift_plugin_")} == set()
    if sys.version_info[:2] == (3, 11):
        limit = CEILINGS[command.removesuffix(" --json") if command.removesuffix(" --json") in CEILINGS else "list"]
        assert len(found - bare) <= limit, f"{len(found - bare)} modules: {sorted(found - bare)}"
    for _ in range(4):  # the machine may be busy: the best of some tries counts
        seconds = min(seconds, modules(*command.split())[2]) if seconds > CPU_SECONDS else seconds
    assert seconds <= CPU_SECONDS


def test_the_plugins_are_there_to_be_imported() -> None:
    """The budget means something only while heavy plugins are installed."""
    command = [sys.executable, "-m", "swift_core.cli.main", "plugins", "list", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=_env())
    names = {row["name"] for row in json.loads(done.stdout) if row["status"] == "READY"}
    assert len(names) > 60  # the families among them
    assert {"swift-plugin-transformers", "swift-plugin-lora", "swift-plugin-torch", "swift-plugin-huggingface"} <= names
