"""The engine `llamacpp`: finds the GGUF file and starts the backend. The model's folder gives tokenizer and template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from swift_core.errors import RequestError
from swift_core.types import ModelFolder
from swift_plugin_openai.environments import python_of, read_recipe
from swift_plugin_openai.worker import WorkerEngine

from swift_plugin_llamacpp.config import LlamaCppConfig


class LlamaCppEngine(WorkerEngine):
    """One sequence at a time; a prompt's beginning that the last one had is not computed again."""

    name = "llamacpp"
    capabilities = frozenset({"stream", "concurrent"})
    backend = Path(__file__).with_name("backend.py")
    serial_scores = True

    def __init__(self, folder: ModelFolder, config: LlamaCppConfig) -> None:
        self.options = config
        self.gguf = find_gguf(Path(folder.folder), config.gguf)
        super().__init__(folder, config, python_of(self.name, config.python, read_recipe(Path(__file__).parent).megabytes))

    def settings(self) -> dict[str, Any]:
        return {"gguf": str(self.gguf.absolute()), "max_length": self.options.max_length, "threads": self.options.threads}


def find_gguf(folder: Path, named: str | None) -> Path:
    """The file to serve. Raises RequestError where it is not there, or not the only one."""
    if named is not None:
        if not Path(named).is_file():
            raise RequestError(f"engine.gguf: {named} is no file")
        return Path(named)
    found = sorted(folder.glob("*.gguf"))
    if len(found) != 1:
        have = f"{len(found)} GGUF files: {', '.join(path.name for path in found)}" if found else "no GGUF file"
        raise RequestError(f"{folder} holds {have}; name one: engine.gguf=FILE")
    return found[0]
