"""What a server serves: the engine, the names that clients know it by, and what all endpoints share."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swift_core.errors import did_you_mean
from swift_core.session import Opened
from swift_core.types import Processor, Template

from swift_plugin_serve.admission import Admission
from swift_plugin_serve.errors import ApiError
from swift_plugin_serve.logs import Log
from swift_plugin_serve.metrics import Metrics
from swift_plugin_serve.settings import Settings
from swift_plugin_serve.store import Store
from swift_plugin_serve.tokens import Tokens

CONTEXT = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")  # keys of config.json


class Served:
    """One engine behind one port.

    processor: the model's, where it is at hand: token ids, their texts and bytes. adapters: names and folders that the engine
    has loaded already.
    """

    def __init__(
        self, opened: Opened, settings: Settings, processor: Processor | None = None, adapters: Mapping[str, Path] | None = None
    ) -> None:
        self.engine, self.settings, self.opened = opened.engine, settings, opened
        self.capabilities = frozenset(getattr(opened.engine, "capabilities", ()))
        self.name = settings.name or _name(opened)
        self.tokens = Tokens(processor) if processor is not None else None
        self.context = settings.max_context or _context(opened)
        self.adapters: dict[str, Path] = dict(adapters or {})
        self.created = int(time.time())
        self.shows_tools: bool | None = None  # whether the chat template renders tools; None: not tried yet
        # An engine that takes one call at a time gets one; the others wait in the queue, where they can be cancelled.
        concurrent = "concurrent" in self.capabilities
        self.admission = Admission(settings.max_running if concurrent else 1, settings.max_waiting)
        self.log = Log(settings.log_prompts)
        self.metrics = Metrics(self.admission)
        self.store = Store(settings.stored, settings.stored_bytes)
        self.live: set[Any] = set()  # generations under way
        self.other = threading.Lock()  # `concurrent` speaks of generate alone: other calls of the engine come one by one

    @property
    def template(self) -> Template:
        """Raises ApiError where the model is behind an address, which has its own."""
        if self.opened.template is None:
            raise ApiError(400, f"{self.name} is served by another server, which has the chat template: this is not known here")
        return self.opened.template

    @property
    def tokenizer(self) -> Tokens:
        if self.tokens is None:
            raise ApiError(400, f"{self.name} has no tokenizer here: token ids are not known")
        return self.tokens

    def names(self) -> list[str]:
        return [self.name, *self.adapters]

    def adapter(self, model: str) -> str | None:
        """The adapter that a model's name stands for. Raises ApiError 404."""
        if model == self.name:
            return None
        if model in self.adapters:
            return model
        near = did_you_mean(model, self.names())
        message = f"model {model!r} is not served here.{near} Served: {', '.join(self.names())}"
        raise ApiError(404, message, code="model_not_found", param="model")

    def needs(self, capability: str, what: str) -> None:
        """Raises ApiError 400 where the engine cannot do `what`."""
        if capability not in self.capabilities:
            raise ApiError(400, f"{what}: the engine of {self.name} cannot do that", code="unsupported")

    def must_generate(self) -> None:
        if "predict" in self.capabilities:
            task = "it has a head, and answers /v1/embeddings or /v1/rerank where that is its task"
            raise ApiError(400, f"{self.name} does not generate text: {task}", code="unsupported")

    def end(self, err: ApiError) -> None:
        """Tell all that is under way or waits that it ends here."""
        self.admission.abandon()
        for generation in list(self.live):
            generation.fail(err)


def _name(opened: Opened) -> str:
    """A name that tells no path of this machine: of a checkpoint of a run, the run's."""
    if opened.ref is None:
        return opened.name.rstrip("/").rpartition("/")[2]
    path = Path(opened.ref.name)
    if not path.is_dir():
        return opened.ref.name
    path = path.resolve()
    return path.parents[1].name if path.parent.name == "checkpoints" else path.name


def _context(opened: Opened) -> int | None:
    """Tokens that the model was made for, prompt and answer together; None where nothing says it."""
    if opened.ref is None:
        return None
    if opened.ref.folder is not None:
        try:
            config = json.loads((opened.ref.folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            config = {}
        for part in (config, *(config.get(key) for key in ("text_config", "llm_config", "language_config"))):
            for key in CONTEXT:
                if isinstance(part, dict) and isinstance(part.get(key), int) and part[key] > 0:
                    return int(part[key])
    known = opened.ref.row.get("context")
    return int(known) if isinstance(known, int) else None
