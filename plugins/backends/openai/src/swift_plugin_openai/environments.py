"""Virtual environments of engines that run in a process of their own: where they are, if they are whole, how they are made.

A plugin describes its own in `environment.toml` beside its manifest, and lists exact versions in requirements files there.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift_core.cache import cache_folder
from swift_core.errors import RequestError, RunError
from swift_core.index import build_index

from swift_plugin_openai.process import environ

FILE = "environment.toml"
REACH = (  # of pip's variables, those that say where packages come from; others would say where they go
    "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX", "PIP_CERT", "PIP_CLIENT_CERT", "PIP_PROXY",
    "PIP_TRUSTED_HOST", "PIP_CACHE_DIR", "PIP_NO_CACHE_DIR",
)  # fmt: skip
MARK = "installed.json"  # written last: an environment without it is not whole


@dataclass(frozen=True)
class Recipe:
    """How one engine's environment is made on one kind of device.

    whole: the requirements name every package, and are installed without their dependencies. module: what it must
    import; package: whose version is shown. told: what a user should know while pip works.
    """

    engine: str
    device: str
    module: str
    package: str
    requirements: Path
    whole: bool
    megabytes: int
    told: str = ""

    @property
    def text(self) -> str:
        return self.requirements.read_text(encoding="utf-8")

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.device}\n{self.text}".encode()).hexdigest()


def read_recipe(folder: Path, device: str = "cpu") -> Recipe:
    """The recipe in a plugin's folder. Raises RequestError where the engine does not run on the device."""
    data = tomllib.loads((folder / FILE).read_text(encoding="utf-8"))
    if (chosen := data.get(device)) is None:
        other = "--cuda" if device == "cpu" else "without --cuda"
        raise RequestError(f"{data['engine']} has no environment for {device}: {data.get('note', f'install it {other}')}")
    return Recipe(
        data["engine"],
        device,
        data["module"],
        chosen["package"],
        folder / chosen["requirements"],
        chosen["whole"],
        chosen["megabytes"],
        chosen.get("told", ""),
    )


def recipes() -> dict[str, Path]:
    """Engines with an environment of their own, and the folder of each one's plugin. No plugin is imported."""
    found = {}
    for plugin in build_index().plugins.values():
        if plugin.usable and plugin.manifest and (plugin.manifest.path.parent / FILE).is_file():
            folder = plugin.manifest.path.parent
            found[tomllib.loads((folder / FILE).read_text(encoding="utf-8"))["engine"]] = folder
    return dict(sorted(found.items()))


def home(engine: str) -> Path:
    return cache_folder() / "engines" / engine


def mark_of(engine: str) -> dict[str, Any] | None:
    """What was written when the environment was whole; None where it is not."""
    try:
        found: dict[str, Any] = json.loads((home(engine) / MARK).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return found if (home(engine) / "bin" / "python").exists() else None


def python_of(engine: str, given: str | None, megabytes: int, flags: str = "") -> str:
    """The interpreter to run an engine with: the one given, else its environment's. Raises RequestError with what to do."""
    if given is not None:
        if not Path(given).is_file():
            raise RequestError(f"engine.python: {given} is no file; name the interpreter of an environment that has {engine}")
        return str(Path(given).absolute())  # not resolved: a link tells Python which environment it is in
    if mark_of(engine) is None:
        words = f"{engine} {flags}".strip()
        begun = "is not whole" if home(engine).exists() else "is not there"
        raise RequestError(
            f"the environment of engine {engine} {begun}. Make it: swift-core backends install {words} "
            f"(about {megabytes:,} MB), or name an interpreter that has it: engine.python=PATH"
        )
    return str(home(engine) / "bin" / "python")


def install(recipe: Recipe, python: str, say: Callable[[str], None]) -> Path:
    """Make an environment, or go on with one that was begun. `say` is told each step. Raises RunError where pip fails."""
    folder = home(recipe.engine)
    mark, own = mark_of(recipe.engine), folder / "bin" / "python"
    if mark and mark["digest"] == recipe.digest:
        say(f"{folder} is whole: nothing to do")
        return folder
    (folder / MARK).unlink(missing_ok=True)
    if not own.exists():
        say(f"making {folder} with {python}")
        _run([python, "-m", "venv", "--clear", str(folder)], "the environment cannot be made")
    pip = [str(own), "-I", "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off", "--quiet"]
    pins = [line for line in recipe.text.splitlines() if line.startswith("torch==")]
    for pin in pins:  # first, by its exact version: no other build of it is chosen then
        say(f"pip install {pin}")
        _run([*pip, pin], f"{pin} cannot be installed")
    rest = ["--no-deps"] if recipe.whole else pins
    count = sum(1 for line in recipe.text.splitlines() if line.strip() and not line.startswith("#"))
    say(f"pip install -r {recipe.requirements.name}: {count} packages, about {recipe.megabytes:,} MB in all")
    if recipe.told:
        say(f"  {recipe.told}")
    _run([*pip, *rest, "-r", str(recipe.requirements)], f"{recipe.requirements} cannot be installed")
    say(f"trying it: import {recipe.module}")
    _run([str(own), "-I", "-c", f"import {recipe.module}"], f"{recipe.module} cannot be imported")
    listed = json.loads(_run([str(own), "-I", "-m", "pip", "list", "--format", "json"], "pip cannot list what it installed"))
    versions = {package["name"]: package["version"] for package in listed}
    content = {"digest": recipe.digest, "device": recipe.device, "versions": versions, "bytes": sum(sizes(folder))}
    part = folder / f"{MARK}.part"
    part.write_text(json.dumps(content, indent=1), encoding="utf-8")
    part.replace(folder / MARK)
    return folder


def _run(words: list[str], failed: str) -> str:
    kept = {name: value for name, value in environ({}).items() if not name.endswith("_OFFLINE")}
    kept |= {name: os.environ[name] for name in REACH if name in os.environ}
    done = subprocess.run(words, capture_output=True, text=True, env=kept)
    if done.returncode:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        told = [line for line in lines if line.startswith("ERROR")] or lines[-3:]
        raise RunError(f"{failed}: {' | '.join(told[:3]) or f'exit code {done.returncode}'}. Run the command again to go on.")
    return done.stdout


def sizes(folder: Path) -> Iterator[int]:
    """Bytes of each file below a folder."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            yield path.stat().st_size
