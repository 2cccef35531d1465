"""Where the tools are installed: a virtual environment each, outside the repository, made by `run --setup`.

swift-core runs from the repository's own environment (`make` fills it), or from the one that runs the benchmark.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path

from benchmarks.train.tools import Tool, llama_factory, ms_swift, swift_core, trl

TOOLS: dict[str, Tool] = {module.TOOL.name: module.TOOL for module in (swift_core, ms_swift, trl, llama_factory)}
REPOSITORY = Path(__file__).resolve().parents[2]
UNSET = ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "PYTHONHOME")  # all tools start from compiled files


def home() -> Path:
    """`$SWIFT_BENCH`, else a folder in the user's cache."""
    base = os.environ.get("SWIFT_BENCH")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swift-core" / "bench"


def python_of(tool: Tool) -> Path:
    """The interpreter that has the tool. Raises FileNotFoundError with the command that makes it."""
    if tool.environment == "swift-core":
        own = REPOSITORY / ".venv" / "bin" / "python"
        return own if own.exists() else Path(sys.executable)
    python = home() / tool.environment / "bin" / "python"
    if not python.exists():
        raise FileNotFoundError(f"{tool.environment} is not installed in {home()}; run: python -m benchmarks.train.run --setup")
    return python


def environ(tool: Tool, scratch: Path, threads: int, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables of a run: no hub, this many threads, and new caches in `scratch`, so that no run finds another's work."""
    kept = {key: value for key, value in os.environ.items() if key not in UNSET}
    caches = {
        "HF_DATASETS_CACHE": "datasets",
        "SWIFT_CACHE": "swift",
        "MODELSCOPE_CACHE": "modelscope",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
    }
    return {
        **kept, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(threads), **{name: str(scratch / folder) for name, folder in caches.items()},
        "PATH": f"{python_of(tool).parent}{os.pathsep}{kept.get('PATH', '')}", **(extra or {}),
    }  # fmt: skip


def setup(tool: Tool) -> None:
    """Make the tool's environment and install exactly what its requirements file lists. Does nothing where that is done.

    torch goes first and with its dependencies; the rest without, since the list is whole and a resolver would add what the
    list leaves out on purpose. Raises CalledProcessError where pip fails.
    """
    if tool.name == "swift-core":
        subprocess.run(["make", ".venv/installed"], cwd=REPOSITORY, check=True)
        return
    folder = home() / tool.name
    wanted = tool.requirements.read_text(encoding="utf-8")
    mark = folder / "installed.txt"
    if mark.exists() and mark.read_text(encoding="utf-8") == wanted:
        return
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True, symlinks=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    torch = next(line for line in wanted.splitlines() if line.startswith("torch=="))
    subprocess.run([*pip, torch], check=True)
    subprocess.run([*pip, "--no-deps", "-r", str(tool.requirements)], check=True)
    if tool.mend:
        tool.mend(folder)
    mark.write_text(wanted, encoding="utf-8")
