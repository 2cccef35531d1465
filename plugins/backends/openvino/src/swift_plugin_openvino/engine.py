"""The engine `openvino`: exports the checkpoint, starts the backend, and says what it has not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from swift_core.errors import CapabilityError
from swift_core.types import ModelFolder, Request
from swift_plugin_openai.environments import python_of, read_recipe
from swift_plugin_openai.worker import WorkerEngine

from swift_plugin_openvino.config import OpenVINOConfig
from swift_plugin_openvino.export import exported


class OpenVINOEngine(WorkerEngine):
    """Continuous batching on a CPU. The folder is exported before the first request, unless that was done before."""

    name = "openvino"
    capabilities = frozenset({"stream", "concurrent", "constraint", "adapters"})
    backend = Path(__file__).with_name("backend.py")
    lacks = ("logit_bias", "top_logprobs")

    def __init__(self, folder: ModelFolder, config: OpenVINOConfig) -> None:
        self.options = config
        super().__init__(folder, config, python_of(self.name, config.python, read_recipe(Path(__file__).parent).megabytes))

    def settings(self) -> dict[str, Any]:
        weights = "int8" if self.options.precision == "int8" else "fp32"
        return {
            "folder": str(exported(Path(self.folder.folder), weights, self.python)), "precision": self.options.precision,
            "threads": self.options.threads, "max_rows": self.options.max_rows, "cache_gb": self.options.cache_gb,
            "cache_precision": self.options.cache_precision, "logprobs": self.options.logprobs,
        }  # fmt: skip

    def check(self, request: Request) -> None:
        super().check(request)
        if request.constraint and request.constraint.kind == "grammar":
            raise CapabilityError("engine openvino takes no Lark grammar; it has json_schema, json_object, regex and choice")
