"""A server's process: how it ends, what its command line refuses, TLS, and adapters by name."""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from swift_core.errors import RequestError
from swift_plugin_serve.command import serve

LONG = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "ignore_eos": True, "stream": True}


def ask(url: str, tokens: int, said: list[str], begun: threading.Event) -> None:
    with httpx.stream(
        "POST", f"{url}/chat/completions", json=LONG | {"model": "tiny", "max_tokens": tokens}, timeout=60
    ) as answer:
        for line in answer.iter_lines():
            said.append(line)
            if '"content":"' in line:
                begun.set()


def test_it_ends_gracefully(start_process: Any, sharp_folder: Path, tmp_path: Path) -> None:
    """A short answer is finished, a long one is told; then the process ends with code 0."""
    with start_process(tmp_path / "log", "--model", sharp_folder, "--grace", "0.5") as process:
        said: dict[str, list[str]] = {"long": [], "short": []}
        begun = {name: threading.Event() for name in said}
        threads = [
            threading.Thread(target=ask, args=(process.url, count, said[name], begun[name]))
            for name, count in (("long", 1000), ("short", 3))
        ]
        for name, thread in zip(said, threads, strict=True):
            thread.start()
            assert begun[name].wait(30)
        assert process.end() == 0
        for thread in threads:
            thread.join(30)
    assert [line for line in said["short"] if line][-1] == "data: [DONE]"
    assert not any("error" in line for line in said["short"])
    lines = [line[6:] for line in said["long"] if line.startswith("data: {")]
    last = json.loads(lines[-1])
    finished = "choices" in last and last["choices"][0]["finish_reason"] == "length"  # a fast machine may be through
    message = "the server is shutting down, and this answer did not finish within 0.5 seconds"
    assert finished or last["error"]["message"] == message
    (ending,) = process.events("ending")
    assert (ending["signal"], ending["grace"]) == ("SIGTERM", 0.5)
    assert process.events("ended")


def test_tls_keys_and_a_name(start_process: Any, sharp_folder: Path, tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True,
    )  # fmt: skip
    keys = tmp_path / "keys"
    keys.write_text("# ours\nalpha\nbeta\n")
    options = ["--model", sharp_folder, "--tls-cert", certificate, "--tls-key", key, "--name", "mine", "--api-key-file", keys]
    with start_process(tmp_path / "log", *options, SWIFT_API_KEY="gamma") as process:
        assert process.url.startswith("https://127.0.0.1:")
        context = ssl.create_default_context(cafile=str(certificate))
        with httpx.Client(verify=context) as client:
            for given, status in (("alpha", 200), ("beta", 200), ("gamma", 200), ("delta", 401)):
                answer = client.get(f"{process.url}/models", headers={"Authorization": f"Bearer {given}"})
                assert answer.status_code == status
            found = client.get(f"{process.url}/models", headers={"Authorization": "Bearer alpha"}).json()
            assert [one["id"] for one in found["data"]] == ["mine"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter", "x"], "--adapter x: NAME=DIR is expected"),
        (["--adapter", "x=a", "--adapter", "x=b"], "--adapter: two have the same name"),
        (["--tls-cert", "x.pem"], "--tls-cert and --tls-key belong together: give both"),
        (["--tls-cert", "/no/x.pem", "--tls-key", "/no/y.pem"], "--tls-cert /no/x.pem: no such file, or it may not be read"),
        (["--cors", "example.org"],
         "--cors example.org: an origin is expected, as https://example.org or http://localhost:3000, or *"),
        (["--cors", "https://example.org/page"],
         "--cors https://example.org/page: an origin is expected, as https://example.org or http://localhost:3000, or *"),
        (["--adapter-root", "/no/such"], "--adapter-root /no/such: no such folder"),
        (["--api-key-file", "/no/such"], "--api-key-file /no/such: No such file or directory"),
        (["--api-key", " "], "--api-key: the key is empty"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1 --port 8000: Cannot assign requested address"),
    ],
)  # fmt: skip
def test_a_wrong_command_line(arguments: list[str], message: str) -> None:
    found = CliRunner().invoke(serve, arguments)
    assert isinstance(found.exception, RequestError)
    assert str(found.exception) == message


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(served: Any) -> None:
    port = served.url.removesuffix("/v1").rpartition(":")[2]
    command = [sys.executable, "-m", "swift_core.cli.main", "serve", "--model", "/no/such/model", "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, f"error: --host 127.0.0.1 --port {port}: Address already in use\n")
