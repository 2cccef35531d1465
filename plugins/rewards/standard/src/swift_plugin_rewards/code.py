"""The reward `code`: the share of a row's tests that the Python in an answer passes."""

from __future__ import annotations

import json
import re
import secrets
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from swift_core.types import Row

from swift_plugin_rewards.answer import raw_of
from swift_plugin_rewards.config import CodeConfig
from swift_plugin_rewards.sandbox import isolates, run

BLOCK = re.compile(r"```(\w*)[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
PYTHON = {"", "python", "python3", "py"}
KEYS = ("tests", "test_list", "verification_info", "input_output", "test")
NAME = re.compile(r"[A-Za-z_]\w*")

HARNESS = """
import json, sys
_mark, _setup, _tests = json.load(open("tests.json"))
open("tests.json", "w").close()
_space = {"__name__": "answer"}
_out = sys.stdout
sys.stdout = sys.stderr
exec(compile(open("answer.py").read(), "answer.py", "exec"), _space)
exec(compile(_setup, "setup.py", "exec"), _space)
for _n, _test in enumerate(_tests):
    try:
        if isinstance(_test, str):
            exec(compile(_test, "test.py", "exec"), _space)
            _passed = True
        else:
            _name, _arguments, _expected = _test
            _found = _space[_name] if _name in _space else getattr(_space["Solution"](), _name)
            _found = _found(*_arguments)
            _passed = json.loads(json.dumps(_found)) == _expected
    except BaseException:
        _passed = False
    if _passed:
        _out.write(f"{_mark} {_n}\\n")
        _out.flush()
"""


@dataclass(frozen=True)
class Tests:
    """A row's tests. calls: Python statements, or `(function, arguments, result)`; pairs: standard input and output."""

    calls: tuple[Any, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()
    setup: str = ""

    def __len__(self) -> int:
        return len(self.calls) + len(self.pairs)


class Code:
    """None for a row without tests. Raises ValueError for tests of an unknown form."""

    waits = True

    def __init__(self, config: CodeConfig) -> None:
        self.config, self.alone = config, isolates(config.network)

    def __call__(self, completions: list[str], rows: list[Row]) -> list[float | None]:
        with ThreadPoolExecutor(self.config.workers) as pool:
            return list(pool.map(self._one, completions, rows))

    def _one(self, said: str, row: Row) -> float | None:
        tests = tests_of(row, self.config.tests)
        if tests is None:
            return None
        program = code_of(raw_of(said))
        if program is None:
            return 0.0
        share = self.passed(program, tests) / len(tests)
        return share if self.config.partial else float(share == 1)

    def passed(self, program: str, tests: Tests) -> int:
        config, count = self.config, 0
        if tests.calls:
            mark = secrets.token_hex(16)
            files = {
                "answer.py": program,
                "harness.py": HARNESS,
                "tests.json": json.dumps([mark, tests.setup, tests.calls]),
            }
            ran = run(files, ["harness.py"], "", config.timeout, config.memory, self.alone)
            count += len({line for line in ran.output.splitlines() if line.startswith(f"{mark} ")})
        for given, expected in tests.pairs:
            ran = run({"answer.py": program}, ["answer.py"], given, config.timeout, config.memory, self.alone)
            count += ran.code == 0 and lines_of(ran.output) == lines_of(expected)
            if not config.partial and not (ran.code == 0 and lines_of(ran.output) == lines_of(expected)):
                break
        return count


def code_of(said: str) -> str | None:
    """The program in an answer: its last block of Python after the reasoning, else all of it where there is no block."""
    text = said.rpartition("</think>")[2]
    blocks = BLOCK.findall(text)
    mine = [body for language, body in blocks if language.lower() in PYTHON]
    if blocks:
        return mine[-1] if mine else None
    return text if text.strip() else None


def lines_of(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def tests_of(row: Row, key: str | None) -> Tests | None:
    """A row's tests, or None where it has none. Raises ValueError naming the key and what is wrong."""
    name = key or next((name for name in KEYS if row.get(name)), None)
    value = row.get(name) if name else None
    if name is None or not value:
        return None
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            value = json.loads(value)
        except ValueError as err:
            raise ValueError(f"reward code: the row's {name!r} is no JSON: {err}") from None
    setup = str(row.get("test_setup_code") or "\n".join(row.get("test_imports") or ()))
    if isinstance(value, str):  # statements; of HumanEval's form, `check(candidate)` is called with the function named
        entry = row.get("entry_point")
        if entry is not None and not NAME.fullmatch(str(entry)):
            raise ValueError(f"reward code: the row's 'entry_point' is no name of a function: {entry!r}")
        return Tests((f"{value}\ncheck({entry})" if entry else value,), (), setup)
    if isinstance(value, dict):
        value = _cases(value, name)
    if not isinstance(value, list):
        raise _unknown(name)
    calls: list[Any] = []
    pairs: list[tuple[str, str]] = []
    for case in value:
        if isinstance(case, str):
            calls.append(case)
        elif isinstance(case, dict) and "input" in case and "output" in case:
            function = case.get("fn_name") or case.get("function")
            if function:
                given = case["input"]
                calls.append((str(function), given if isinstance(given, list) else [given], case["output"]))
            else:
                pairs.append((_text(case["input"]), _text(case["output"])))
        else:
            raise _unknown(name)
    return Tests(tuple(calls), tuple(pairs), setup)


def _cases(value: dict[str, Any], name: str) -> list[Any]:
    """`{"test_cases": [...]}`, or APPS' `{"inputs": [...], "outputs": [...], "fn_name"?}`."""
    if isinstance(value.get("test_cases"), list):
        return list(value["test_cases"])
    inputs, outputs, function = value.get("inputs"), value.get("outputs"), value.get("fn_name")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise _unknown(name)
    return [{"input": a, "output": b, "fn_name": function} for a, b in zip(inputs, outputs, strict=True)]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _unknown(name: str) -> ValueError:
    return ValueError(
        f"reward code: the row's {name!r} has tests of an unknown form: expected a list of assert statements, or of "
        '{"input", "output", "fn_name"?}'
    )
