"""What infer, chat and eval share: sampling options as a request, an adapter on top of the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click
from swift_core.cli.common import options
from swift_core.config import Component
from swift_core.errors import RequestError
from swift_core.models import ModelRef, resolve_model
from swift_core.session import Session
from swift_core.types import Request

ENGINE = click.option("--engine", metavar="E", help="What generates [transformers].")
ADAPTER = click.option("--adapter", metavar="DIR", help="An adapter's folder to load on top of the model.")
NUCLEUS = click.FloatRange(0, 1, min_open=True)
SAMPLING = options(
    click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True, help="New tokens at most."),
    click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0: the likeliest token."),
    click.option("--top-p", type=NUCLEUS, default=1.0, show_default=True, help="Sample from the likeliest, up to this share."),
    click.option("--top-k", type=click.IntRange(0), default=0, show_default=True, help="Sample from the K likeliest; 0: all."),
    click.option("--stop", multiple=True, help="A text that ends an answer."),
)


def take_request(flags: dict[str, Any]) -> Request:
    """The request that the sampling options make; they are taken out of a command's flags."""
    sampling = {name: flags.pop(name) for name in ("max_tokens", "temperature", "top_p", "top_k")}
    return Request(**sampling, stop=list(flags.pop("stop")))


def model_with(session: Session, adapter: str | None) -> ModelRef:
    """The session's model, with the adapter of `--adapter` on top. Raises RequestError where that folder holds none."""
    ref = session.model_ref
    if adapter is None:
        return ref
    found = resolve_model(session.registry, Component(adapter))
    if found.adapter is None:
        raise RequestError(f"adapter {adapter}: no adapter is in this folder")
    return replace(ref, adapter=found.adapter, plan=found.plan, adapter_type=found.adapter_type)
