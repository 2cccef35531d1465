"""Plugins made for a test: a package, its manifest and its metadata, as they lie in site-packages."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

MakePlugin = Callable[..., str]


@pytest.fixture
def make_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakePlugin]:
    """`make_plugin("lora", '[[tuners]]\\nid = "lora"', hooks="...")` writes swift-plugin-lora; returns the folder, which is
    put on sys.path."""
    made: list[str] = []

    def make(name: str, tables: str = "", hooks: str = "", version: str = "1.0", api: str = "0.9", **files: str) -> str:
        package = f"swift_plugin_{name.replace('-', '_')}"
        folder = tmp_path / "site"
        (folder / package).mkdir(parents=True)
        head = f'name = "swift-plugin-{name}"\napi = "{api}"\nsummary = "{name}"\nhooks = "{package}.hooks"\n'
        written = {"__init__.py": "", "hooks.py": hooks, "swift_plugin.toml": head + tables}
        for file, text in (written | {f"{stem}.py": text for stem, text in files.items()}).items():
            (folder / package / file).write_text(text, encoding="utf-8")
        info = folder / f"{package}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: swift-plugin-{name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[swift.manifest]\n{name} = {package}:swift_plugin.toml\n")
        made.append(package)
        monkeypatch.syspath_prepend(str(folder))
        return str(folder)

    yield make
    for module in list(sys.modules):
        if module.partition(".")[0] in made:
            del sys.modules[module]
