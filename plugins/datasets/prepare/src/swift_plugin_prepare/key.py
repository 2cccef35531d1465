"""The key of prepared data: a hash of all that decides on it. The same key, the same samples.

What cannot be told beforehand, such as the rows of a plugin that names no content, has no key and is prepared anew.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from swift_core.cache import fingerprint
from swift_core.config import dump_options
from swift_core.session import Chosen
from swift_core.source import Source
from swift_core.types import RawDataset

from swift_plugin_prepare.store import FORMAT

WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".onnx", ".h5", ".msgpack")
PREPARATION = ("max_length", "overflow")  # the trainer's options that decide on samples


def make_key(
    sources: Sequence[Source], template: list[Any], trainer_config: Any, bad_rows: str, holdout: float, seed: int,
    versions: Mapping[str, str],
) -> str | None:  # fmt: skip
    """None where the content of a source, or of the template, is not known."""
    contents = [s.dataset.fingerprint() if isinstance(s.dataset, RawDataset) else None for s in sources]
    if None in contents or None in template:
        return None
    rows = [
        [s.name, s.component and settings_of(s.component, versions), s.sample, s.weight, s.evaluation, content]
        for s, content in zip(sources, contents, strict=True)
    ]
    chance = holdout or any(source.sample is not None or source.weight % 1 for source in sources)
    options = [getattr(trainer_config, name, None) for name in PREPARATION]
    own = fingerprint(sorted(Path(__file__).parent.glob("*.py")))
    whole = [FORMAT, own, rows, template, options, bad_rows, holdout, seed if chance else None]
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()[:32]


def settings_of(component: Chosen, versions: Mapping[str, str]) -> list[Any]:
    """A component's id, its plugin with version and code, the libraries it requires, its options and the files they name."""
    contribution, values = component.contribution, dump_options(component.options)
    files = [Path(value) for value in values.values() if isinstance(value, str) and value and Path(value).is_file()]
    content = fingerprint(path for path in files if str(path) != values.get("path"))  # that is a data set's own
    required = sorted(re.split(r"[^\w.-]", text, maxsplit=1)[0] for text in contribution.entry.requires)
    libraries = {name: versions.get(name) for name in required}
    plugin = contribution.plugin
    return [contribution.id, plugin.name, plugin.version, code_of(plugin.name.replace("-", "_")), libraries, values, content]


def template_content(template: Any, folder: Path | None) -> str | None:
    """What a template and its tokenizer are made of: its own `fingerprint()`, else the model's folder without its weights."""
    kind = f"{type(template).__module__}.{type(template).__qualname__}"
    if hasattr(template, "fingerprint"):
        return f"{kind} {template.fingerprint()}"
    if folder is None:
        return None
    return f"{kind} {fingerprint(sorted(f for f in folder.iterdir() if f.is_file() and f.suffix not in WEIGHTS))}"


def code_of(package: str) -> str:
    """A hash of a plugin's modules, named by one of them: a plugin that is being worked on keeps its version."""
    spec = find_spec(package.partition(".")[0])
    folders = list(spec.submodule_search_locations or []) if spec else []
    return fingerprint(sorted(file for folder in folders for file in Path(folder).rglob("*.py")))
