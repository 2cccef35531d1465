"""`swift-core plugins check NAME`: the contracts of its kinds on an installed plugin, a line for each check that fails.

The plugins lie in data/checked/CASE, each folder as it would lie in site-packages. Each offers a data set: no model is needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support import Result, swift_process

CHECKED = Path(__file__).parent / "data" / "checked"
CHECKS = ["imports_nothing_heavy", "options_have_help", "hooks_are_marked", "no_overrides", "answers_its_id_only"]
CHECKS += ["gives_the_same_standard_rows_twice"]

FAILED = {
    "silent": ("options_have_help", "no help text: count"),
    "greedy": ("answers_its_id_only", "assert [Record("),
    "heavy": ("imports_nothing_heavy", "torch is imported at module level; import it inside the hook"),
    "shifting": ("gives_the_same_standard_rows_twice", "where='row 1'"),
}
"""Case -> the one check that fails, and what its line holds."""


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """A function that checks a fixture, as the only one of them that is installed."""

    def run(case: str, *more: str) -> Result:
        monkeypatch.setenv("PYTHONPATH", str(CHECKED / case))
        return swift_process("plugins", "check", case, *more)

    return run


def outcomes(done: Result) -> dict[str, tuple[str, str]]:
    (row,) = json.loads(done.out)
    return {check["name"]: (check["outcome"], check["reason"]) for check in row["checks"]}


def test_a_sound_plugin(check: Callable[..., Result]) -> None:
    assert check("sound").ok().out == "swift-plugin-sound 0.1.0: ok (6 checks)\n"
    assert outcomes(check("sound", "--json").ok()) == {f"dataset.sound {name}": ("ok", "") for name in CHECKS}


@pytest.mark.parametrize("case", FAILED)
def test_a_fault_is_one_line_and_exit_code_1(check: Callable[..., Result], case: str) -> None:
    name, reason = FAILED[case]
    done = check(case)
    assert (done.code, done.error) == (1, "1 of 1 fail")
    head, line = done.out.splitlines()
    assert head == f"swift-plugin-{case} 0.1.0: 1 of 6 checks failed"
    assert line.startswith(f"  failed: dataset.{case} {name}: ")
    assert reason in line


def test_what_the_defaults_cannot_serve_is_not_run(check: Callable[..., Result]) -> None:
    done = check("asking")
    lines = done.out.splitlines()
    assert lines[0] == "swift-plugin-asking 0.1.0: 1 of 6 checks failed"  # its option has no help text either
    reason = "dataset.asking: option 'path' must be set"
    assert f"  not run: dataset.asking answers_its_id_only: {reason}" in lines
    assert f"  not run: dataset.asking gives_the_same_standard_rows_twice: {reason}" in lines


def test_a_plugin_that_ends_the_process(check: Callable[..., Result]) -> None:
    done = check("deadly")
    assert (done.code, done.error) == (1, "1 of 1 fail")
    assert "  failed: contracts: the process ended with exit code 3" in done.out


def test_a_real_tuner() -> None:
    """Its contract needs a model: the tiny one of swift-plugin-transformers."""
    found = outcomes(swift_process("plugins", "check", "full", "--json").ok())
    assert found["tuner.full merged_equals_unmerged"] == ("ok", "")
    assert {outcome for outcome, _ in found.values()} <= {"ok", "not run"}


def test_without_the_tiny_model_what_needs_it_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where swift-plugin-transformers, whose pytest plugin brings it, is not installed."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    found = outcomes(swift_process("plugins", "check", "full", "--json").ok())
    reason = "it needs the fixture 'tiny_bundle'; it comes with swift-plugin-transformers"
    assert found["tuner.full merged_equals_unmerged"] == ("not run", reason)
    assert found["tuner.full options_have_help"] == ("ok", "")


def test_without_pytest_only_what_needs_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`sitecustomize` hides pytest from the interpreter that checks."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n\n\nclass Hidden:\n    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'pytest':\n            raise ModuleNotFoundError(name)\n\n\n"
        "sys.meta_path.insert(0, Hidden())\n"
    )
    for case, code in (("sound", 0), ("silent", 1)):
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{CHECKED / case}")
        done = swift_process("plugins", "check", case)
        assert done.code == code
        assert "  not run: contracts: pytest is not installed. Get it: pip install pytest" in done.out.splitlines()
        assert (f"  failed: dataset.{case} options_have_help: no help text: count" in done.out) == bool(code)
