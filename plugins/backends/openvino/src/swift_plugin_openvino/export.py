"""A checkpoint in OpenVINO's form: made once by optimum-intel in the engine's environment, and found again by its content."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

from swift_core.cache import BLOCK, WHOLE, cache_folder
from swift_core.errors import RunError
from swift_plugin_openai.process import environ

FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")
FORM = "1"  # raised where the same checkpoint is exported differently


def content_of(folder: Path) -> str:
    """A hash of a checkpoint's files, wherever they lie; of very large ones, their size and blocks spread over them."""
    digest = hashlib.sha256(FORM.encode())
    for path in sorted({path for pattern in FILES for path in folder.glob(pattern)}):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            places = range(0, size, BLOCK) if size <= WHOLE else ((size - BLOCK) * n // 63 for n in range(64))
            for place in places:
                file.seek(place)
                digest.update(file.read(BLOCK))
    return digest.hexdigest()[:32]


def exported(folder: Path, weights: str, python: str) -> Path:
    """The folder of the exported model; made where it is not there. `weights` is fp32 or int8. Raises RunError."""
    target = cache_folder() / "openvino" / f"{content_of(folder)}-{weights}"
    if target.exists():
        return target
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    words = [
        python, "-I", "-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", str(folder.absolute()),
        "--task", "text-generation-with-past", "--weight-format", weights, str(part),
    ]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, env=environ({}), stdin=subprocess.DEVNULL)
    if done.returncode or not (part / "openvino_model.xml").is_file():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        shutil.rmtree(part, ignore_errors=True)
        raise RunError(f"{folder} cannot be exported for OpenVINO: {' | '.join(lines[-3:]) or f'exit code {done.returncode}'}")
    part.replace(target)
    return target
