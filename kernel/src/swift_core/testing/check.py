"""`swift-core plugins check NAME`: the contract of each row of a plugin's manifest, run on the plugin as it is installed.

The contracts run in a process of their own, under pytest; where pytest is missing, only the checks that need none are made.
A check is not run where the contract's defaults do not suit the plugin: its own tests say what does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from swift_core.api import KINDS
from swift_core.errors import PluginLoadError, RequestError, SwiftError, one_line
from swift_core.index import Plugin
from swift_core.registry import Contribution
from swift_core.testing.static import STATIC

MODULE = """
from swift_core.testing import {singular}Contract
class Test{number}({singular}Contract):
    distribution, id = {name!r}, {id!r}
    trains_prompt = True  # whether a template trains its prompts, only its own tests can say
"""


@dataclass(frozen=True)
class Check:
    """One check and how it went: "ok", "failed" or "not run", with the reason."""

    name: str  # "tuner.lora saves_and_loads"
    outcome: str
    reason: str = ""


def check_plugin(plugin: Plugin) -> list[Check]:
    """Every check of a plugin that can be imported."""
    try:
        import pytest  # noqa: F401
    except ImportError:
        lacking = "pytest is not installed. Get it: pip install pytest"
        return [*_static(plugin), Check("contracts", "not run", lacking)]
    with TemporaryDirectory() as folder:
        file, found = Path(folder) / "test_contracts.py", Path(folder) / "checks.jsonl"
        rows = [(entry.id, KINDS[entry.kind].capitalize()) for entry in plugin.entries]
        texts = (MODULE.format(singular=kind, number=n, name=plugin.name, id=ident) for n, (ident, kind) in enumerate(rows))
        file.write_text("".join(texts), encoding="utf-8")
        path = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "PYTEST_ADDOPTS": ""}
        command = [sys.executable, "-m", "swift_core.testing.check", str(file), str(found)]
        done = subprocess.run(command, env=os.environ | path, capture_output=True, text=True)
        lines = found.read_text(encoding="utf-8").splitlines() if found.exists() else []
        checks = [Check(**json.loads(line)) for line in lines]
        if done.returncode > 1 or done.returncode < 0 or not checks:  # 1: pytest counted failures
            last = (done.stderr.strip() or done.stdout.strip()).rpartition("\n")[2]
            checks.append(Check("contracts", "failed", f"the process ended with exit code {done.returncode}: {last}"))
    return checks


def _static(plugin: Plugin) -> Iterator[Check]:
    for contribution in (Contribution(entry, plugin) for entry in plugin.entries):
        for check in STATIC:
            try:
                fault = check(contribution)
            except SwiftError as err:
                fault = str(err)
            yield Check(f"{contribution.address} {check.__name__}", "failed" if fault else "ok", fault)


def judge(err: BaseException | None) -> tuple[str, str]:
    """Outcome and reason of a check that ended so. A RequestError blames the request: here, the contract's defaults."""
    if err is None:
        return "ok", ""
    kind = type(err).__name__
    if kind == "Skipped" or (isinstance(err, RequestError) and not isinstance(err, PluginLoadError)):
        return "not run", " ".join(str(err).split())
    if kind == "FixtureLookupError":
        name = getattr(err, "argname", "")
        bring = "; it comes with swift-plugin-transformers" if name.startswith("tiny_") else ""
        return "not run", f"it needs the fixture {name!r}{bring}"
    return "failed", one_line(err)[:300]


def main(file: str, found: str) -> int:
    """Run the contracts of a file; each check becomes a line of `found`. Returns pytest's exit code."""
    import pytest

    class Recorder:
        def pytest_runtest_makereport(self, item: Any, call: Any) -> None:
            err = call.excinfo.value if call.excinfo else None
            if call.when == "call" or err is not None:
                name = f"{KINDS[item.cls.kind]}.{item.cls.id} {item.name.removeprefix('test_')}"
                with open(found, "a", encoding="utf-8") as out:
                    out.write(json.dumps(asdict(Check(name, *judge(err)))) + "\n")

    options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-c", os.devnull, "--rootdir", str(Path(file).parent)]
    return int(pytest.main([*options, file], plugins=[Recorder()]))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
