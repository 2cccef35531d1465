"""A setting of a request, changed by name: `temperature=0.7`."""

from __future__ import annotations

from dataclasses import replace

from swift_core.errors import did_you_mean
from swift_core.types import Request

SETTINGS: dict[str, tuple[type, float, float]] = {
    "max_tokens": (int, 1, float("inf")), "min_tokens": (int, 0, float("inf")), "temperature": (float, 0, float("inf")),
    "top_p": (float, 1e-9, 1), "top_k": (int, 0, float("inf")), "min_p": (float, 0, 1),
    "repetition_penalty": (float, 1e-9, float("inf")), "presence_penalty": (float, -2, 2),
    "frequency_penalty": (float, -2, 2), "seed": (int, 0, float("inf")),
}  # fmt: skip


def with_setting(request: Request, text: str) -> tuple[Request, str]:
    """The request with a setting changed, and the setting as it is now. Raises ValueError, saying what is wrong."""
    name, equals, value = (part.strip() for part in text.partition("="))
    name = name.replace("-", "_")
    if not equals:
        raise ValueError(f"{text!r}: NAME=VALUE is expected, such as temperature=0.7")
    if name not in SETTINGS:
        raise ValueError(f"no setting {name!r}.{did_you_mean(name, SETTINGS) or ' There are: ' + ', '.join(SETTINGS)}")
    kind, least, most = SETTINGS[name]
    try:
        number = kind(value)
    except ValueError:
        raise ValueError(f"{name}: a number is expected, not {value!r}") from None
    if not least <= number <= most:
        raise ValueError(f"{name}: {value} is out of range")
    return replace(request, **{name: number}), f"{name} = {number}"
