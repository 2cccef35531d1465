"""What a request may ask: each wrong value is one line, said before anything runs. And the engine's own processors."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

from swift_core.errors import RequestError, one_line
from swift_core.types import Request

from swift_plugin_torch.sampling import Processor


def check(request: Request, vocabulary: int) -> None:
    """Raise RequestError for a value outside its range."""
    for name, least in (("max_tokens", 1), ("n", 1), ("min_tokens", 0), ("top_k", 0), ("top_logprobs", 0)):
        if getattr(request, name) < least:
            raise RequestError(f"{name}: expected at least {least}, not {getattr(request, name)}")
    ranges = (("temperature", 0, 1e6), ("top_p", 0, 1), ("min_p", 0, 1))
    for name, least_share, most in ranges:
        if not least_share <= getattr(request, name) <= most:
            raise RequestError(f"{name}: expected a number from {least_share} to {most:g}, not {getattr(request, name)}")
    if not request.repetition_penalty > 0:
        raise RequestError(f"repetition_penalty: expected a number above 0, not {request.repetition_penalty}")
    for name in ("presence_penalty", "frequency_penalty"):
        if not abs(getattr(request, name)) < 1e6:
            raise RequestError(f"{name}: expected a number, not {getattr(request, name)}")
    for name, ids in (
        ("logit_bias", request.logit_bias),
        ("stop_ids", request.stop_ids),
        ("token_ids", request.token_ids or []),
    ):
        for token in ids:
            if not 0 <= token < vocabulary:
                raise RequestError(f"{name}: token {token} is not in the vocabulary, whose last is {vocabulary - 1}")
    for token, bias in request.logit_bias.items():
        if not abs(bias) < 1e6:
            raise RequestError(f"logit_bias: expected a number for token {token}, not {bias}")


def load_processors(names: list[str]) -> list[Processor]:
    """The functions named `module:function` or `file.py:function`. Raises RequestError."""
    return [_load(name) for name in names]


def _load(name: str) -> Processor:
    place, _, function = name.rpartition(":")
    try:
        if place.endswith(".py"):
            path = Path(place).resolve()
            spec = importlib.util.spec_from_file_location(f"swift_processor_{path.stem}", path)
            if spec is None or spec.loader is None or not path.is_file():
                raise RequestError(f"engine.processors: there is no file {place}")
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except RequestError:
        raise
    except Exception as err:
        raise RequestError(f"engine.processors: {place} cannot be imported: {one_line(err)}") from err
    found: Processor | None = getattr(module, function, None)
    if not callable(found):
        raise RequestError(f"engine.processors: {place} has no function {function!r}")
    return found
