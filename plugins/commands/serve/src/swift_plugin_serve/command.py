"""`swift-core serve`: a model behind OpenAI's API."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import click
from swift_core.cli.common import ARGUMENTS, MODEL, TRUST, config_of, options
from swift_core.errors import CapabilityError, RequestError
from swift_core.events import console_events
from swift_core.session import Session

from swift_plugin_serve.settings import Settings

LOOPBACK = ("127.0.0.1", "localhost", "::1")
ORIGIN = re.compile(r"https?://[^\s/?#@*]+")


@click.command()
@options(
    ARGUMENTS, MODEL,
    click.option("--adapter", "adapters", multiple=True, metavar="NAME=DIR", help="An adapter, asked for by its name."),
    click.option("--engine", metavar="E", help="What generates [transformers]."),
    click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on; 0.0.0.0 is every one."),
    click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: any that is free."),
    click.option("--name", metavar="N", help="The model's name for clients [its id, or the name of its folder or run]."),
    click.option("--page", is_flag=True, help="A chat page at /."),
    click.option("--api-key", "api_keys", multiple=True, metavar="KEY", help="A key; others see it in the process list."),
    click.option("--api-key-file", metavar="FILE", help="Keys, one a line. Also: the variable SWIFT_API_KEY."),
    click.option("--cors", multiple=True, metavar="ORIGIN", help="Let pages of this origin ask, as https://example.org."),
    click.option("--tls-cert", metavar="FILE", help="A certificate chain, PEM."),
    click.option("--tls-key", metavar="FILE", help="Its private key, PEM."),
    click.option("--adapter-root", metavar="DIR", help="Let clients load adapters from folders in here."),
    click.option("--max-running", type=click.IntRange(1, 4096), default=64, show_default=True, help="Requests at once."),
    click.option("--max-waiting", type=click.IntRange(0), default=256, show_default=True, help="More that wait; beyond: 429."),
    click.option("--max-body", type=click.FloatRange(0, min_open=True), default=32.0, show_default=True, metavar="MIB",
                 help="Size of a request."),
    click.option("--max-context", type=click.IntRange(2), metavar="N", help="Tokens of prompt and answer [config.json's]."),
    click.option("--timeout", type=click.FloatRange(0, min_open=True), default=600.0, show_default=True, metavar="SECONDS",
                 help="Of a request."),
    click.option("--grace", type=click.FloatRange(0), default=20.0, show_default=True, metavar="SECONDS",
                 help="For requests under way, when the server is told to end."),
    click.option("--stored", type=click.IntRange(0), default=1000, show_default=True, help="Responses kept for their ids."),
    click.option("--log-prompts", is_flag=True, help="Write requests into the log."),
    TRUST,
)  # fmt: skip
def serve(
    arguments: tuple[str, ...], adapters: tuple[str, ...], host: str, port: int, name: str | None, page: bool,
    api_keys: tuple[str, ...], api_key_file: str | None, cors: tuple[str, ...], tls_cert: str | None, tls_key: str | None,
    adapter_root: str | None, max_running: int, max_waiting: int, max_body: float, max_context: int | None, timeout: float,
    grace: float, stored: int, log_prompts: bool, **flags: Any,
) -> None:  # fmt: skip
    """Serve a model over OpenAI's API, until it is told to end."""
    from swift_plugin_serve.app import make_app
    from swift_plugin_serve.auth import keys_of
    from swift_plugin_serve.memory import few_arenas
    from swift_plugin_serve.run import bound, run
    from swift_plugin_serve.served import Served

    named = [_named(text) for text in adapters]
    if len({ident for ident, _ in named}) < len(named):
        raise RequestError("--adapter: two have the same name")
    _check_tls(tls_cert, tls_key)
    for origin in cors:
        if origin != "*" and not ORIGIN.fullmatch(origin):
            raise RequestError(f"--cors {origin}: an origin is expected, as https://example.org or http://localhost:3000, or *")
    root = _folder(adapter_root) if adapter_root is not None else None
    settings = Settings(
        name=name, keys=keys_of(api_keys, api_key_file), cors=cors, hosts=LOOPBACK if host in LOOPBACK else (), page=page,
        adapter_root=root, max_running=max_running, max_waiting=max_waiting, max_body=int(max_body * (1 << 20)),
        timeout=timeout, grace=grace, max_context=max_context, stored=stored, log_prompts=log_prompts,
    )  # fmt: skip
    config = config_of(arguments, **flags)
    few_arenas()
    listening = bound(host, port)  # before the model is loaded: a port that is taken is told at once
    try:
        with Session(config, console_events()) as session:
            opened = session.opened()
            loaded: dict[str, Path] = {}
            for ident, folder in named:
                if "adapters" not in opened.engine.capabilities:
                    raise CapabilityError(f"--adapter {ident}: this engine takes no adapters")
                found = session.model_with(folder).adapter
                assert found is not None
                opened.engine.load_adapter(ident, found)
                loaded[ident] = found
            processor = session.processor(opened.ref) if opened.ref is not None else None
            served = Served(opened, settings, processor, loaded)
            if served.name in loaded:
                raise RequestError(
                    f"--adapter {served.name}: this is the model's own name; give the one or the other a new one"
                )
            run(make_app(served), served, listening, tls_cert, tls_key)
    finally:
        listening.close()


def _named(text: str) -> tuple[str, str]:
    name, equals, folder = text.partition("=")
    if not equals or not name or not folder:
        raise RequestError(f"--adapter {text}: NAME=DIR is expected")
    return name, folder


def _folder(text: str) -> Path:
    path = Path(text).expanduser().resolve()
    if not path.is_dir():
        raise RequestError(f"--adapter-root {text}: no such folder")
    return path


def _check_tls(certificate: str | None, key: str | None) -> None:
    if (certificate is None) != (key is None):
        raise RequestError("--tls-cert and --tls-key belong together: give both")
    for option, file in (("--tls-cert", certificate), ("--tls-key", key)):
        if file is not None and not os.access(file, os.R_OK):
            raise RequestError(f"{option} {file}: no such file, or it may not be read")
    if certificate is not None:
        import ssl

        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
        except (ssl.SSLError, OSError) as err:
            raise RequestError(f"--tls-cert {certificate} --tls-key {key}: no certificate and its key in PEM ({err})") from None
