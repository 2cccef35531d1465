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


class Weights:
    """Which version of the policy an engine answers with. `adapter` is the name that requests carry, or None."""

    def __init__(self, engine: Engine, tuned: TunedModel) -> None:
        self.engine, self.tuned = engine, tuned
        self.inside = getattr(engine, "model", None) is tuned.model  # the engine runs the model that is trained
        self.version, self.adapter = 0, None  # type: int, str | None
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
        elif self.by_adapter:
            self._load(version)
        else:
            self.engine.sync_weights(steps.full_weights("policy"), version)
        self.version = version

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _saves_adapter(self) -> bool:
        folder = self._folder / "probe"
        folder.mkdir()
        self.tuned.save(folder)
        return (folder / "adapter_config.json").is_file()

    def _load(self, version: int) -> None:
        name, before = f"policy-{version}", self.adapter
        folder = self._folder / name
        folder.mkdir(exist_ok=True)
        self.tuned.save(folder)
        try:
            self.engine.load_adapter(name, folder)
        except RequestError:
            if before is None:
                raise
            self.engine.unload_adapter(before)  # there was no room for two
            self.adapter = before = None
            try:
                self.engine.load_adapter(name, folder)
            except RequestError as err:
                raise RunError(
                    f"the engine lost version {self.version} of the policy and did not take {version}: {err}"
                ) from err
        self.adapter = name
        if before is not None and before != name:
            self.engine.unload_adapter(before)
        for old in self._folder.iterdir():
            if old.name != name:
                shutil.rmtree(old, ignore_errors=True)
