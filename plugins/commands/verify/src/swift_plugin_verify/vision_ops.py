"""Lets torchvision be imported where its compiled operators do not load, as beside a build of torch for the CPU only.

Its transforms are Python over torch, and image and video processors use nothing else. What the operators do is not replaced:
calling one fails. Importing this module, before transformers, is all; where torchvision is not installed nothing happens.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

NEEDED = ("nms", "qnms")  # operators that importing torchvision looks up by name


def declare_missing() -> torch.library.Library | None:
    """The names of the operators, declared; None where torchvision is not installed or its own operators load."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    try:
        torch.ops.load_library(str(next(Path(spec.origin).parent.glob("_C.*"))))
    except (OSError, StopIteration):
        library = torch.library.Library("torchvision", "DEF")
        for name in NEEDED:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


LIBRARY = declare_missing()  # operators are declared for as long as it lives
