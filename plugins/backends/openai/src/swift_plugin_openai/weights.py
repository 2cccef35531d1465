"""Weights that come while an engine runs, as folders that its server can load: a checkpoint anew, or a LoRA adapter anew.

Nothing is changed in place: a folder is written whole beside the one in service, which stays until the new one is loaded.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift_core.errors import RequestError

SHARD = 1 << 30  # bytes of a weights file, about
INDEX = "model.safetensors.index.json"
LORA = re.compile(r"\.(lora_[AB])(?:\.[^.]+)?\.weight$")  # peft: `...q_proj.lora_A.NAME.weight`, without NAME in files
WRAPPED = "base_model.model."  # before each name of a peft model


@dataclass(frozen=True)
class Made:
    """What was written: a checkpoint's folder, an adapter's, or both; None for what stays as it is."""

    model: Path | None = None
    adapter: Path | None = None


class Folders:
    """Scratch folders of one engine. They go with `close`; those of a process that was killed go with the next engine's."""

    def __init__(self, engine: str) -> None:
        self._prefix, self._root = f"swift-core-{engine}-weights-", None
        self._count = 0

    @property
    def root(self) -> Path:
        if self._root is None:
            for left in Path(tempfile.gettempdir()).glob(f"{self._prefix}*"):
                pid = left.name.removeprefix(self._prefix).partition("-")[0]
                if pid.isdigit() and not Path(f"/proc/{pid}").exists():
                    shutil.rmtree(left, ignore_errors=True)
            self._root = Path(tempfile.mkdtemp(prefix=f"{self._prefix}{os.getpid()}-"))
        return self._root

    def new(self, kind: str) -> Path:
        self._count += 1
        made = self.root / f"{kind}-{self._count}"
        made.mkdir()
        return made

    def drop(self, folder: Path | None) -> None:
        """Remove a folder that is one of these."""
        if folder is not None and self._root is not None and folder.parent == self._root:
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        if self._root is not None:
            shutil.rmtree(self._root, ignore_errors=True)


def write(weights: Iterator[tuple[str, Any]], model: Path, adapter: Path | None, folders: Folders) -> Made:
    """Read all weights, by the names of a model or of a peft model, and write what they change.

    model, adapter: the folders in service. A base weight of a peft model that is the one in service changes nothing. Raises
    RequestError for a name that neither has.
    """
    kept: list[Path] = []
    try:
        written = _Written(model, folders, kept)
        lora: dict[str, Any] = {}
        wrapped = False
        for name, tensor in weights:
            wrapped = wrapped or name.startswith(WRAPPED)
            if LORA.search(name):
                lora[LORA.sub(r".\1.weight", name)] = tensor.detach().cpu().contiguous().clone()
            else:
                written.add(name.removeprefix(WRAPPED).replace(".base_layer.", "."), tensor)
        made = written.close(wrapped)
        return Made(made, _adapter(lora, adapter, folders, kept) if lora else None)
    except BaseException:
        for folder in kept:
            folders.drop(folder)
        raise


class _Written:
    """A checkpoint's folder as it is written, a file for each gibibyte; opened with the first weight."""

    def __init__(self, source: Path, folders: Folders, kept: list[Path]) -> None:
        self.source, self.folders, self.kept = source, folders, kept
        self.folder: Path | None = None
        self.places: dict[str, str] = {}  # of each name, its file
        self.waiting: dict[str, Any] = {}
        self.size = 0
        self.changed = False

    def add(self, name: str, tensor: Any) -> None:
        if self.folder is None:
            self._open()
        if name not in self.known:
            if name == "lm_head.weight" and self.tied:
                return
            raise RequestError(f"weight {name!r} is not one of the checkpoint's, {next(iter(self.known))} for example")
        if self.waiting.get(name) is not None or name in self.places:
            raise RequestError(f"weight {name!r} came twice")
        shape = self.known[name]
        if list(tensor.shape) != shape:
            raise RequestError(f"weight {name!r} has shape {list(tensor.shape)}, and the checkpoint's has {shape}")
        # A copy: the trainer goes on changing its own
        self.waiting[name] = tensor.detach().cpu().contiguous().clone()
        self.size += tensor.numel() * tensor.element_size()
        if self.size >= SHARD:
            self._flush()

    def close(self, compare: bool) -> Path | None:
        """The folder, with the weights that did not come as they were; None where no weight came, or none is another."""
        if self.folder is None or (compare and not self.places and self._same()):
            self.folders.drop(self.folder)
            return None
        for path, names in _files(self.source).items():
            with _opened(path) as file:
                for name in names:
                    if name not in self.places and name not in self.waiting:
                        self.waiting[name] = tensor = file.get_tensor(name)
                        self.size += tensor.numel() * tensor.element_size()
                        if self.size >= SHARD:
                            self._flush()
        self._flush()
        (self.folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": self.places}), encoding="utf-8")
        return self.folder

    def _open(self) -> None:
        self.known = {}
        for path, names in _files(self.source).items():
            with _opened(path) as file:
                self.known |= {name: list(file.get_slice(name).get_shape()) for name in names}
        config = json.loads((self.source / "config.json").read_text(encoding="utf-8"))
        text = config.get("text_config") or {}
        self.tied = bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", True)))
        self.folder = self.folders.new("model")
        self.kept.append(self.folder)
        for path in self.source.iterdir():
            if path.is_file() and path.suffix not in (".safetensors", ".bin", ".pt", ".gguf") and path.name != INDEX:
                shutil.copyfile(path, self.folder / path.name)

    def _same(self) -> bool:
        import torch

        for path, names in _files(self.source).items():
            with _opened(path) as file:
                for name in names:
                    if name in self.waiting:
                        old = file.get_tensor(name)
                        if not torch.equal(self.waiting[name].to(old.dtype), old):
                            return False
        return True

    def _flush(self) -> None:
        from safetensors.torch import save_file

        if self.waiting:
            assert self.folder is not None
            file = f"model-{len(set(self.places.values())) + 1:05d}.safetensors"
            save_file(self.waiting, self.folder / file, metadata={"format": "pt"})
            self.places |= dict.fromkeys(self.waiting, file)
            self.waiting, self.size = {}, 0


def _adapter(lora: dict[str, Any], current: Path | None, folders: Folders, kept: list[Path]) -> Path:
    """A folder of an adapter with new weights, and the config of the one in service."""
    from safetensors.torch import save_file

    if current is None:
        raise RequestError("weights of an adapter came, and the engine has none: open it with the adapter's folder")
    with _opened(current / "adapter_model.safetensors") as file:
        known = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  (no dict)
    named = {name if name.startswith(WRAPPED) else WRAPPED + name: tensor for name, tensor in lora.items()}
    for name, tensor in named.items():
        if list(tensor.shape) != known.get(name):
            told = f"has shape {known[name]}" if name in known else "has none of that name"
            raise RequestError(f"weight {name!r} has shape {list(tensor.shape)}, and the adapter's {told}")
    if missing := known.keys() - named.keys():
        raise RequestError(f"the adapter's weights did not come whole: {sorted(missing)[0]} and {len(missing) - 1} others lack")
    made = folders.new("adapter")
    kept.append(made)
    shutil.copyfile(current / "adapter_config.json", made / "adapter_config.json")
    save_file(named, made / "adapter_model.safetensors", metadata={"format": "pt"})
    return made


def _files(folder: Path) -> dict[Path, list[str]]:
    """The weights files of a checkpoint, with the names in each. Raises RequestError where it has none."""
    index = folder / INDEX
    if index.is_file():
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {folder / file: [name for name, at in places.items() if at == file] for file in sorted(set(places.values()))}
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise RequestError(f"{folder} holds no safetensors: weights that come by name have no place in it")
    found = {}
    for path in paths:
        with _opened(path) as file:
            found[path] = list(file.keys())
    return found


def _opened(path: Path) -> Any:
    from safetensors import safe_open

    return safe_open(path, "pt")
