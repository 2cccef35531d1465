"""The resolved plan of a run: which plugin, in which version, answers for which name. Saved beside every checkpoint.

Each rank of a run activates from `plan.json` and compares versions, and a checkpoint is loaded again by what its plan says.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from swift_core import __version__
from swift_core.api import API
from swift_core.config import Component
from swift_core.errors import RequestError
from swift_core.index import PluginIndex


@dataclass
class Plan:
    """`components` maps a kind to `{"name", "plugin", "options"}`; `plugins` a distribution to its version."""

    components: dict[str, Any] = field(default_factory=dict)
    plugins: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)  # the run's, resolved in full: seed and flags are here
    data: str = ""  # fingerprint of the samples
    core: str = __version__
    api: str = f"{API[0]}.{API[1]}"

    def save(self, folder: Path) -> None:
        write_json(folder / "plan.json", asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Plan:
        """Read `plan.json`. Raises RequestError when it is missing or broken."""
        file = folder / "plan.json"
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise RequestError(f"{folder} holds no plan.json: it is not a run or a checkpoint of swift-core.") from None
        except (ValueError, TypeError, OSError) as err:
            raise RequestError(f"{file} cannot be read: {err}") from None

    def component(self, kind: str) -> Component:
        """A component as it was, to be chosen again."""
        planned = self.components[kind]
        return Component(planned["name"], planned["plugin"], planned["options"])

    def settings(self) -> dict[str, Any]:
        """Every option by its dotted address, and as `tuner.provider` the plugin that answers for a name."""
        providers = {f"{kind}.provider": part["plugin"] for kind, part in self.components.items()}
        return _flat(self.config, "") | providers

    def differences(self, index: PluginIndex) -> list[str]:
        """What is installed in another version than the plan was made with."""
        found = {name: plugin.version for name, plugin in index.plugins.items()} | {"swift-core": __version__}
        planned = {**self.plugins, "swift-core": self.core}
        return [
            f"{name} {version} (now {found.get(name, 'missing')})"
            for name, version in planned.items()
            if found.get(name) != version
        ]


def _flat(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that a reader sees the old one or the new one, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    temporary.replace(path)
