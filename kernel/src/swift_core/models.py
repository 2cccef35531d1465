"""Finds what a model name means: an installed id, a folder, a run, a checkpoint, an adapter, or a hub id.

A folder's name never decides anything: config.json's architecture does. Nothing is loaded here.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from swift_core.activate import load_object
from swift_core.config import Component
from swift_core.errors import PluginError, PluginLoadError, RequestError, SwiftError, did_you_mean, one_line
from swift_core.plan import Plan
from swift_core.registry import Contribution, Registry, check_requires, read_model_config
from swift_core.rundir import Checkpoints


@dataclass(frozen=True)
class ModelRef:
    """A resolved model. `source` is what the loader opens: a folder or a hub id."""

    name: str
    source: str
    loader: Contribution
    family: Contribution | None = None
    architecture: str | None = None
    quantization: str | None = None  # quant_method of the folder's config.json
    adapter: Path | None = None  # a folder to load on top
    adapter_type: str | None = None  # of an adapter that another tool wrote: "lora"
    plan: Plan | None = None  # the checkpoint's, when swift-core wrote it
    options: dict[str, Any] = field(default_factory=dict)  # of the model component

    @property
    def folder(self) -> Path | None:
        return Path(self.source) if Path(self.source).is_dir() else None

    @property
    def template_id(self) -> str:
        own = self.family.entry.options.get("template") if self.family else None
        return str(own or "checkpoint")

    def describe(self) -> dict[str, Any]:
        """What `models show` prints."""
        entry = self.family.entry if self.family else None
        return {
            "id": self.name,
            "family": self.family.plugin.name.removeprefix("swift-plugin-") if self.family else None,
            "plugin": (self.family or self.loader).plugin.name,
            "architecture": self.architecture,
            "loader": self.loader.id,
            "template": self.template_id,
            "capabilities": list(entry.capabilities) if entry else [],
            "quantization": self.quantization,
            "adapter": str(self.adapter) if self.adapter else None,
            "folder": str(self.folder) if self.folder else None,
        }


def resolve_model(registry: Registry, component: Component) -> ModelRef:
    """The model behind a component's name. Raises RequestError saying what was looked for."""
    name = component.name or ""
    path = Path(name).expanduser()
    if registry.has("models", name):
        entry = registry.find("models", name, component.provider)
        source = entry.entry.options.get("source")
        if not source:
            raise RequestError(f"model {name!r} is a family, not a checkpoint: give a folder or a hub id")
        folder = _made_folder(entry, source)
        return replace(_plain_folder(registry, folder, component), name=name, family=entry)
    if path.is_dir():
        return _folder(registry, path, component)
    known = registry.checkpoint(name)
    if known:
        family, row = known
        architecture = row.get("architecture") or next(iter(family.entry.options.get("architectures", ())), None)
        return ModelRef(
            name, name, registry.loader(architecture, component.provider), family, architecture, options=component.options
        )
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) and not path.exists() and path.suffix not in (".gguf", ".safetensors"):
        return ModelRef(name, name, registry.generic("models", component.provider), options=component.options)
    ids = [c.id for c in registry.all("models") if c.entry.options.get("source")]
    installed = ", ".join(ids) or "none"
    if path.is_file():
        raise RequestError(f"model {name!r} is a file; give the folder that holds config.json and the weights")
    if lack := registry.missing("models", name):
        raise lack
    raise RequestError(
        f"model {name!r}: no such folder, and no installed model id.{did_you_mean(name, ids)} Installed ids: {installed}. "
        "A hub id reads owner/name."
    )


def _made_folder(entry: Contribution, source: str) -> Path:
    """Call a manifest's `source`: the local folder of a checkpoint that a plugin brings."""
    lack = check_requires(entry)
    if lack:
        raise PluginLoadError(f"model {entry.id!r} comes from {entry.plugin.name} {entry.plugin.version}: {lack}")
    make = load_object(source, entry)
    try:
        return Path(make())
    except SwiftError:
        raise
    except Exception as err:
        raise PluginError(entry.plugin.name, source, one_line(err)) from err


def _folder(registry: Registry, path: Path, component: Component) -> ModelRef:
    if (path / "checkpoints").is_dir() and not (path / "config.json").is_file():
        path = Checkpoints(path).last_of_run()
    plan = Plan.load(path) if (path / "plan.json").is_file() else None
    if (path / "config.json").is_file():
        return replace(_plain_folder(registry, path, component), plan=plan)
    if plan:
        model = plan.components["model"]
        base = resolve_model(registry, Component(model["name"], model.get("provider"), model["options"] | component.options))
        return replace(base, name=str(path), adapter=path, plan=plan)
    if (path / "adapter_config.json").is_file():
        try:
            saved = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
            base_name, adapter_type = saved["base_model_name_or_path"], str(saved["peft_type"]).lower()
        except (ValueError, KeyError) as err:
            raise RequestError(f"{path / 'adapter_config.json'} names no base model: {err}") from None
        base = resolve_model(registry, Component(base_name, component.provider, component.options))
        return replace(base, name=str(path), adapter=path, adapter_type=adapter_type)
    raise RequestError(f"model {path}: the folder holds neither config.json nor an adapter nor a run")


def _plain_folder(registry: Registry, path: Path, component: Component) -> ModelRef:
    config = read_model_config(path)
    architecture = next(iter(config.get("architectures") or ()), None)
    quantization = (config.get("quantization_config") or {}).get("quant_method")
    loader, family = registry.loader(architecture, component.provider), registry.family(architecture)
    return ModelRef(str(path), str(path.resolve()), loader, family, architecture, quantization, options=component.options)
