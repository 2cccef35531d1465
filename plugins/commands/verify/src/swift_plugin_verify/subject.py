"""One verification, whole: build the tiny model of an architecture, or take a folder as it is, and run the checks on it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from swift_plugin_verify.build import CannotBuild, build
from swift_plugin_verify.catalog import Architecture
from swift_plugin_verify.checks import MEDIA, TEXT, Check, Subject, run_checks


def verify_subject(subject: Architecture | Path, scratch: Path) -> dict[str, Any]:
    """`{"checks": {name: {"state", "note"}}}`. Nothing is raised: a fault is a failed check."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    results: dict[str, Check] = {}
    built, folder = None, subject if isinstance(subject, Path) else scratch / "model"
    if isinstance(subject, Architecture):
        try:
            built = build(subject, folder)
        except CannotBuild as err:
            results["build"] = Check("fail", str(err))
            return _table(results)
        results["build"] = Check("pass")
    kind, model_type = (subject.kind, subject.model_type) if isinstance(subject, Architecture) else ("text", "")
    results |= run_checks(Subject(folder, scratch, built, kind, model_type), TEXT if kind == "text" else MEDIA)
    return _table(results)


def _table(results: dict[str, Check]) -> dict[str, Any]:
    return {"checks": {name: asdict(check) for name, check in results.items()}}
