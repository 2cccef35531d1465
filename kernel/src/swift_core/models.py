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

TOLD = ("parameters", "active", "context", "chat", "licence", "modelscope", "requires", "note")  # of a checkpoint's row
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")


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
    row: dict[str, Any] = field(default_factory=dict)  # of the family's table of checkpoints
    remote_code: bool | None = None  # whether loading runs code that comes with the checkpoint; None where nothing says it

    @property
    def folder(self) -> Path | None:
        return Path(self.source) if Path(self.source).is_dir() else None

    @property
    def template_id(self) -> str:
        """The checkpoint's own template; the family's for a folder that ships none."""
        own = self.family.entry.options.get("template") if self.family else None
        return str(own) if own and self.folder and not ships_template(self.folder) else "checkpoint"

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
            "capabilities": self.row.get("capabilities") or (list(entry.capabilities) if entry else []),
            "remote_code": self.remote_code,
            "quantization": self.quantization,
            "adapter": str(self.adapter) if self.adapter else None,
            "folder": str(self.folder) if self.folder else None,
            **{key: self.row[key] for key in TOLD if key in self.row},
            **{key: entry.options[key] for key in ("thinking", "traps") if entry and key in entry.options},
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
        loader, code = registry.loader(architecture, component.provider), row.get("remote_code", False)
        return ModelRef(name, name, loader, family, architecture, options=component.options, row=row, remote_code=code)
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) and not path.exists() and path.suffix not in (".gguf", ".safetensors"):
        return ModelRef(name, name, registry.generic("models", component.provider), options=component.options)
    ids = [c.id for c in registry.all("models") if c.entry.options.get("source")]
    installed = ", ".join(ids) or "none"
    if path.is_file():
        raise RequestError(f"model {name!r} is a file; give the folder that holds config.json and the weights")
    if lack := registry.missing("models", name):
        raise lack
    published = [row["id"] for c in registry.all("models") for row in registry.checkpoints(c)]
    meant = [ident for ident in published if ident.rpartition("/")[2].lower() == name.lower()][:3]
    hint = f" Did you mean: {', '.join(meant)}?" if meant else did_you_mean(name, ids)
    raise RequestError(
        f"model {name!r}: no such folder, and no installed model id.{hint} Installed ids: {installed}. "
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
    architecture, model_type = next(iter(config.get("architectures") or ()), None), config.get("model_type")
    quantization = (config.get("quantization_config") or {}).get("quant_method")
    loader = registry.loader(architecture, component.provider, model_type)
    family = registry.family(architecture, model_type, component.provider)
    code = bool(config.get("auto_map")) and not registry.families(None, model_type)  # the families' types need no such code
    return ModelRef(
        str(path), str(path.resolve()), loader, family, architecture, quantization, options=component.options, remote_code=code,
        row=_shared(registry, family, architecture),
    )  # fmt: skip


def _shared(registry: Registry, family: Contribution | None, architecture: str | None) -> dict[str, Any]:
    """What a folder can do: what all checkpoints of its architecture can that its family's table names."""
    rows = registry.checkpoints(family) if family else []
    every = [row.get("capabilities", []) for row in rows if row.get("architecture") == architecture]
    return {"capabilities": [known for known in every[0] if all(known in row for row in every)]} if every else {}


def ships_template(folder: Path) -> bool:
    """Whether a model folder has a chat template: a file of its own, or one inside its tokenizer's or processor's settings."""
    if any((folder / name).exists() for name in TEMPLATE_FILES):
        return True
    for name in ("tokenizer_config.json", "processor_config.json"):
        try:
            if json.loads((folder / name).read_text(encoding="utf-8")).get("chat_template"):
                return True
        except (OSError, ValueError, AttributeError):
            continue
    return False
