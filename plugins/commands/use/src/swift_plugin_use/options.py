"""What the commands share: sampling options as a request, an adapter on top of the model, metrics by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
from swift_core.cli.common import options
from swift_core.types import Request

ENGINE = click.option("--engine", metavar="E", help="What generates [transformers].")
ADAPTER = click.option("--adapter", metavar="DIR", help="An adapter's folder to load on top of the model.")
SHARE = click.FloatRange(0, 1, min_open=True)
FIELDS = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def sampling(temperature: float = 0.0) -> Callable[[Any], Any]:
    """The options that make a request; `temperature` is the default."""
    shown: dict[str, Any] = {"show_default": True}
    return options(
        click.option("--max-tokens", type=click.IntRange(1), default=256, help="New tokens at most.", **shown),
        click.option(
            "--temperature", type=click.FloatRange(0), default=temperature, help="0: the likeliest token.", **shown
        ),
        click.option("--top-p", type=SHARE, default=1.0, help="Sample from the likeliest, up to this share.", **shown),
        click.option("--top-k", type=click.IntRange(0), default=0, help="Sample from the K likeliest; 0: all.", **shown),
        click.option("--min-p", type=click.FloatRange(0, 1), default=0.0,
                     help="Leave out what is less likely than this share of the likeliest.", **shown),
        click.option("--repetition-penalty", type=click.FloatRange(0, min_open=True), default=1.0,
                     help="Above 1: what was said already is less likely.", **shown),
        click.option("--seed", type=int, default=None, help="Of sampling [42]."),
        click.option("--stop", multiple=True, help="A text that ends an answer."),
    )  # fmt: skip


SAMPLING = sampling()


def take_request(flags: dict[str, Any]) -> Request:
    """The request that the sampling options make; they are taken out of a command's flags, but for the seed."""
    return Request(**{name: flags.pop(name) for name in FIELDS}, stop=list(flags.pop("stop")))
