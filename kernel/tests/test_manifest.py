"""Manifests: what a sound one becomes, and the one line that each wrong one gives."""

from __future__ import annotations

from pathlib import Path

import pytest
from swift_core.api import KINDS
from swift_core.manifest import Entry, ManifestError, read_manifest

HEAD = 'name = "swift-plugin-x"\napi = "0.9"\nsummary = "x"\n'
HOOKS = HEAD + 'hooks = "swift_plugin_x.hooks"\n'


def read(folder: Path, text: str) -> tuple[Entry, ...]:
    (folder / "swift_plugin.toml").write_text(text, encoding="utf-8")
    return read_manifest(folder / "swift_plugin.toml").entries


def test_a_whole_manifest(tmp_path: Path) -> None:
    text = HOOKS + (
        'requires = ["a"]\n[[models]]\nid = "qwen3"\nsummary = "Qwen3"\narchitectures = ["Q"]\nloads = true\n'
        'requires = ["b>=2"]\ncapabilities = ["text"]\nconfig = "swift_plugin_x.config:X"\n'
        '[[parts]]\nkind = "metric"\nid = "rouge"\n[[commands]]\nname = "go"\nhelp = "Go."\ntarget = "swift_plugin_x.go:go"\n'
    )
    model, part, command = read(tmp_path, text)
    assert model == Entry(
        "models", "qwen3", "Qwen3", ("b>=2",), "swift_plugin_x.config:X", ("text",), {"architectures": ["Q"], "loads": True}
    )
    assert (part.id, part.singular, part.options) == ("metric/rouge", "part", {"kind": "metric"})
    assert (command.id, command.summary, command.options) == ("go", "Go.", {"target": "swift_plugin_x.go:go"})
    manifest = read_manifest(tmp_path / "swift_plugin.toml")
    assert (manifest.name, manifest.api, manifest.hooks) == ("swift-plugin-x", (0, 9), "swift_plugin_x.hooks")
    assert manifest.requires == ("a",)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("name =", "swift_plugin.toml is not valid TOML: Invalid value (at end of document)"),
        ('name = "x"\napi = "0.9"\n', "the manifest: summary is missing"),
        (HEAD.replace("0.9", "one"), "api must read MAJOR.MINOR, such as 0.9, not 'one'"),
        (HEAD + 'hook = "x"\n', "the manifest: unknown key 'hook'. Did you mean: hooks?"),
        (HEAD + "hooks = 3\n", "the manifest: hooks must be a str, not int"),
        (HEAD + '[[tuners]]\nid = "x"\n', "hooks is missing: the dotted name of the module that answers for these ids"),
        (HOOKS + '[[tuner]]\nid = "x"\n', "unknown table [[tuner]]. Did you mean: tuners, trainers?"),
        (HOOKS + '[[tuners]]\nsummary = "x"\n', "[[tuners]]: id is missing"),
        (HOOKS + '[[tuners]]\nid = "x"\nconfg = "a:B"\n', "[[tuners]]: unknown key 'confg'. Did you mean: config?"),
        (HOOKS + '[[tuners]]\nid = "x"\nconfig = "a.B"\n', "[[tuners]] x: config must read module:name, not 'a.B'"),
        (HOOKS + '[[tuners]]\nid = "x"\nrequires = "torch"\n', "[[tuners]]: requires must be a list, not str"),
        (HOOKS + '[[tuners]]\nid = "x"\n[[tuners]]\nid = "x"\n', "[[tuners]] names 'x' twice"),
        (HOOKS + '[[parts]]\nid = "x"\n', "[[parts]]: kind is missing"),
        (
            HOOKS + '[[parts]]\nid = "x"\nkind = "metrics"\n',
            "[[parts]] x: kind must be one of preparer, rows, optimizer, loss, metric, reward, tool_format, environment, "
            "logger, hub",
        ),
        (HEAD + '[[commands]]\nname = "x"\ntarget = "a:b"\n', "[[commands]]: help is missing"),
        (
            HEAD + '[[commands]]\nname = "model verify"\nhelp = "X."\ntarget = "a:b"\n',
            "[[commands]] 'model verify' must be one word, or one after a group: models, templates, tuners, trainers, "
            "backends, engines, quantizers, evaluators, datasets, parts, callbacks, plugins, plugin, config",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, text: str, error: str) -> None:
    with pytest.raises(ManifestError) as caught:
        read(tmp_path, text)
    assert str(caught.value) == error


def test_a_missing_file_names_its_folder(tmp_path: Path) -> None:
    with pytest.raises(ManifestError) as caught:
        read_manifest(tmp_path / "swift_plugin.toml")
    assert str(caught.value) == f"its manifest swift_plugin.toml is missing from {tmp_path}"


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "swift_plugin.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ManifestError, match=r"^swift_plugin.toml is not valid TOML: 'utf-8' codec"):
        read_manifest(tmp_path / "swift_plugin.toml")


def test_neither_commands_nor_packaged_checkpoints_need_hooks(tmp_path: Path) -> None:
    text = HEAD + '[[commands]]\nname = "x"\nhelp = "X."\ntarget = "a:b"\n[[models]]\nid = "m"\nsource = "a:folder"\n'
    assert [entry.id for entry in read(tmp_path, text)] == ["x", "m"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("parts", "commands")])
def test_every_kind_takes_the_common_keys(tmp_path: Path, kind: str) -> None:
    keys = 'id = "x"\nsummary = "s"\nrequires = ["r"]\nconfig = "a:B"\ncapabilities = ["c"]\n'
    assert read(tmp_path, HOOKS + f"[[{kind}]]\n{keys}") == (Entry(kind, "x", "s", ("r",), "a:B", ("c",)),)
