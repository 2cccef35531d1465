"""The reward `code`: forms of tests, and what limits hold."""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from swift_core.errors import RequestError
from swift_plugin_rewards import code, sandbox
from swift_plugin_rewards.code import Code, code_of
from swift_plugin_rewards.config import CodeConfig

ADD = "```python\ndef add(a, b):\n    return a + b\n```"
SOLUTION = "```python\nclass Solution:\n    def f(self, n): return [n]\n```"
ECHO = "Here:\n```python\nprint(int(input()) * 2)\n```\ndone"


def judged(said: str, row: dict[str, Any], **options: Any) -> float | None:
    (found,) = Code(CodeConfig(**options))([said], [row])
    return found


@pytest.mark.parametrize(
    ("said", "row", "worth"),
    [
        (ADD, {"tests": ["assert add(1, 2) == 3", "assert add(1, 2) == 4"]}, 0.5),
        (ADD, {"test_list": ["assert add(f, 2) == 3"], "test_setup_code": "f = 1"}, 1),
        (ADD, {"test": "def check(f):\n    assert f(1, 1) == 2", "entry_point": "add"}, 1),
        (ADD, {"tests": [{"input": [1, 2], "output": 3, "fn_name": "add"}]}, 1),
        (ADD, {"input_output": json.dumps({"inputs": [[1, 2], [0, 0]], "outputs": [3, 1], "fn_name": "add"})}, 0.5),
        (ECHO, {"tests": [{"input": "4", "output": "8"}, {"input": "x", "output": "0"}]}, 0.5),
        (ECHO, {"verification_info": {"test_cases": [{"input": "4\n", "output": "8\n"}]}}, 1),
        ("```python\nimport os\nos._exit(0)\n```", {"tests": ["assert add(1, 2) == 3"]}, 0),  # a clean end is no pass
        ("```python\ndef add(a, b: return\n```", {"tests": ["assert add(1, 2) == 3"]}, 0),
        (SOLUTION, {"tests": [{"input": [1], "output": [1], "fn_name": "f"}]}, 1),
        ("```js\nadd\n```", {"tests": ["assert add(1, 2) == 3"]}, 0),
        (ADD, {}, None),
    ],
)  # fmt: skip
def test_tests_of_every_form(said: str, row: dict[str, Any], worth: float | None) -> None:
    assert judged(said, row) == worth


def test_all_or_nothing() -> None:
    assert judged(ADD, {"tests": ["assert add(1, 2) == 3", "assert add(1, 2) == 4"]}, partial=False) == 0


def test_unknown_forms_are_told() -> None:
    for value in ([3], {"a": 1}, {"inputs": [1], "outputs": []}):
        with pytest.raises(ValueError, match="the row's 'tests' has tests of an unknown form"):
            code.tests_of({"tests": value}, None)
    with pytest.raises(ValueError, match="is no JSON"):
        code.tests_of({"tests": "[1"}, None)
    assert code_of("a = 1") == "a = 1"
    assert code_of("<think>```python\n1\n```</think>```py\n2\n```") == "2\n"


def block(program: str) -> str:
    return f"```python\n{program}\n```"


def test_time_and_what_it_leaves_running(tmp_path: Path) -> None:
    left = tmp_path / "left"
    child = f"import time; time.sleep(4); open({str(left)!r}, 'w')"
    program = f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {child!r}])\ntime.sleep(60)"
    begun = time.monotonic()
    assert judged(block(program), {"tests": [{"input": "", "output": ""}]}, timeout=1.0) == 0
    assert time.monotonic() - begun < 4
    time.sleep(max(0.0, begun + 6 - time.monotonic()))
    assert not left.exists()


def test_memory_and_files() -> None:
    row = {"tests": [{"input": "", "output": "ok"}]}
    assert judged(block("x = bytearray(900 << 20)\nprint('ok')"), row, memory=256) == 0
    assert judged(block("x = bytearray(20 << 20)\nprint('ok')"), row, memory=256) == 1
    assert judged(block("open('f', 'wb').write(bytes(64 << 20))\nprint('ok')"), row) == 0
    assert judged(block("import os\nprint('ok' if 'SECRET' not in os.environ and os.listdir('.') else 'no')"), row) == 1


def test_no_network_where_it_can_be_cut_off() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=lambda: server.accept(), daemon=True).start()
        port = server.getsockname()[1]
        program = block(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)\nprint('ok')")
        row = {"tests": [{"input": "", "output": "ok"}]}
        if sandbox.unshares():
            assert judged(program, row, network="auto") == 0
            assert judged(program, row, network="deny") == 0
        assert judged(program, row, network="allow") == 1


def test_deny_is_refused_where_it_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "unshares", lambda: False)
    with pytest.raises(RequestError, match="network=deny needs `unshare`"):
        Code(CodeConfig(network="deny"))
    assert Code(CodeConfig()).alone is False


def test_numpy_may_be_used() -> None:
    assert judged(block("import numpy\nprint(int(numpy.ones(3).sum()))"), {"tests": [{"input": "", "output": "3"}]}) == 1
