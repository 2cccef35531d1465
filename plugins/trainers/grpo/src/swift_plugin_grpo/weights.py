"""Brings the policy's weights to the engine that makes rollouts, as numbered versions.

An engine on the policy itself only hears that the weights are others. One in another process gets an adapter where both the
tuner and the engine have adapters, else all weights.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from swift_core.errors import CapabilityError, RequestError, RunError
from swift_core.types import Engine, TunedModel

NAME = "policy"


class Weights:
    """Which version of the policy an engine answers with. `adapter` is the name that requests carry, or None."""

    def __init__(self, engine: Engine, tuned: TunedModel) -> None:
        self.engine, self.tuned = engine, tuned
        self.inside = getattr(engine, "model", None) is tuned.model  # the engine runs the model that is trained
        self.version = 0
        self.adapter: str | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="swift-policy-"))
        self.by_adapter = not self.inside and "adapters" in engine.capabilities and self._saves_adapter()
        if not self.inside and not self.by_adapter and "sync" not in engine.capabilities:
            raise CapabilityError(
                f"engine {type(engine).__name__} takes neither adapters of this tuner nor weights while it runs: "
                "use tuner=lora, or engine=transformers"
            )

    def sync(self, steps: Any, version: int) -> None:
        """Let the engine answer with the policy as it is now. Raises RunError where it could not, saying what it has."""
        if self.inside:
            self.tuned.model.eval()
            self.engine.sync_weights(iter(()), version)
        elif not (self.by_adapter and self._load(version)):
            self.engine.sync_weights(steps.full_weights("policy"), version)
        self.version = version

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _saves_adapter(self) -> bool:
        """Tried, for tuners that keep what they train beside the model's weights; others save the whole model."""
        if not hasattr(self.tuned, "weights"):
            return False
        folder = self._folder / "probe"
        folder.mkdir()
        self.tuned.save(folder)
        return (folder / "adapter_config.json").is_file()

    def _load(self, version: int) -> bool:
        """False where the engine takes no adapter of this kind, DoRA say, but whole weights."""
        folder = self._folder / f"version-{version}"
        folder.mkdir(exist_ok=True)
        self.tuned.save(folder)
        try:
            self.engine.load_adapter(NAME, folder)  # the one before stays until this one is there
        except (RequestError, RunError) as err:
            if self.adapter is None and isinstance(err, RequestError) and "sync" in self.engine.capabilities:
                self.by_adapter = False
                return False
            kept = "the base model" if self.adapter is None else f"version {self.version}"
            raise RunError(f"weights of version {version} were not taken, {kept} stays in service: {err}") from err
        self.adapter = NAME
        for old in self._folder.iterdir():
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)
        return True
