"""A broken plugin says in one line what is wrong with it, and leaves every other plugin working.

The plugins lie in data/broken/CASE, each folder as it would lie in site-packages; `good` is a sound one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support import swift_process
from swift_core import __version__
from swift_core.activate import Activator
from swift_core.api import API
from swift_core.errors import PluginLoadError, RequestError
from swift_core.index import build_index
from swift_core.registry import Registry
from swift_core.types import TunedModel

BROKEN = Path(__file__).parent / "data" / "broken"
CASES = sorted(path.name for path in BROKEN.iterdir() if path.name != "good")
SPEAKS = f"swift-core {__version__} speaks {API[0]}.{API[1]}"

AT_INDEX = {
    "missing-manifest": (
        "lost", "BROKEN", f"its manifest swift_plugin.toml is missing from {BROKEN / 'missing-manifest' / 'swift_plugin_lost'}",
    ),
    "bad-toml": (
        "garbled", "BROKEN",
        "swift_plugin.toml is not valid TOML: Expected newline or end of document after a statement (at line 2, column 10)",
    ),
    "older-api": (
        "older", "INCOMPATIBLE",
        f"swift-plugin-older 0.1.0 was made for plugin API 0.1; {SPEAKS}. Upgrade: pip install -U swift-plugin-older",
    ),
    "newer-api": (
        "newer", "INCOMPATIBLE",
        f"swift-plugin-newer 0.1.0 was made for plugin API 9.0; {SPEAKS}. Upgrade: pip install -U swift-core",
    ),
}  # fmt: skip
"""Faults that the index sees: case -> plugin, status, reason."""

ON_ACTIVATION = {
    "import-error": (
        "unimportable",
        "tuner 'unimportable' comes from swift-plugin-unimportable 0.1.0, which failed to import: "
        "ModuleNotFoundError: No module named 'no_such_library' (--debug shows the traceback)",
    ),
    "system-exit": (
        "quitter",
        "tuner 'quitter' comes from swift-plugin-quitter 0.1.0, which failed to import: "
        "SystemExit: no licence (--debug shows the traceback)",
    ),
    "wrong-signature": (
        "ill-fitting",
        "tuner 'ill-fitting' comes from swift-plugin-ill-fitting 0.1.0, whose hooks do not fit: "
        "swift_apply_tuner has no argument 'colour'; it has: tuner_id, bundle, config",
    ),
    "misspelt-hook": (
        "misspelt",
        "tuner 'misspelt' comes from swift-plugin-misspelt 0.1.0, whose hooks do not fit: "
        "unknown hook 'swift_aply_tuner'. Did you mean: swift_apply_tuner, swift_make_trainer, swift_make_launcher?",
    ),
}
"""Faults that importing brings out: case -> plugin (and its tuner), error."""

LACKS = "tuner 'needy': it needs no-such-library>=2, which is not installed. Get it: pip install 'no-such-library>=2'"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that puts folders of data/broken on the path, here and in processes, and returns them."""

    def install(*cases: str) -> list[str]:
        folders = [str(BROKEN / case) for case in cases]
        monkeypatch.setenv("PYTHONPATH", ":".join(folders))
        for folder in folders:
            monkeypatch.syspath_prepend(folder)
        return folders

    yield install
    for name in [name for name in sys.modules if name.startswith("swift_plugin_")]:
        if str(BROKEN) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def tune(registry: Registry, activator: Activator, ident: str, provider: str | None = None) -> Any:
    found = registry.find("tuners", ident, provider)
    return activator.call(found, "swift_apply_tuner", TunedModel, tuner_id=ident, bundle="model", config=None)


def rows(*arguments: str) -> dict[str, Any]:
    return {row["name"]: row for row in json.loads(swift_process(*arguments, "--json").out)}


def test_every_case_is_here() -> None:
    assert sorted([*AT_INDEX, *ON_ACTIVATION, "missing-requirement", "two-claims"]) == CASES


@pytest.mark.parametrize("case", CASES)
def test_the_good_one_works_beside_it(installed: Any, case: str) -> None:
    registry, activator = Registry(build_index(installed("good", case))), Activator()
    broken = [name for name in registry.index.plugins if name != "swift-plugin-good"]
    for name in broken:
        with pytest.raises(RequestError):
            tune(registry, activator, name.removeprefix("swift-plugin-"))
    assert registry.index.plugins["swift-plugin-good"].status == "READY"
    assert type(tune(registry, activator, "good")).__name__ == "Good"
    assert [name for name, _ in activator.manager.list_name_plugin()] == ["swift-plugin-good"]


@pytest.mark.parametrize("case", AT_INDEX)
def test_the_index_says_why(installed: Any, case: str) -> None:
    name, status, reason = AT_INDEX[case]
    plugin = build_index(installed(case)).plugins[f"swift-plugin-{name}"]
    assert (plugin.status, plugin.reason) == (status, reason)


@pytest.mark.parametrize("case", ON_ACTIVATION)
def test_activation_says_why(installed: Any, case: str) -> None:
    ident, error = ON_ACTIVATION[case]
    registry = Registry(build_index(installed(case)))
    assert registry.index.plugins[f"swift-plugin-{ident}"].status == "READY"
    with pytest.raises(PluginLoadError) as caught:
        tune(registry, Activator(), ident)
    assert str(caught.value) == error


def test_a_missing_requirement_is_named_before_anything_is_imported(installed: Any) -> None:
    registry = Registry(build_index(installed("missing-requirement")))
    with pytest.raises(PluginLoadError) as caught:
        tune(registry, Activator(), "needy")
    reason = LACKS.removeprefix("tuner 'needy': ")
    assert str(caught.value) == f"tuner 'needy' comes from swift-plugin-needy 0.1.0: {reason}"
    assert "swift_plugin_needy" not in sys.modules


def test_two_claims_stop_the_run_that_names_the_id_until_one_is_chosen(installed: Any) -> None:
    registry = Registry(build_index(installed("two-claims", "good")))
    first, second = (registry.index.plugins[f"swift-plugin-{name}"] for name in ("first", "second"))
    assert (first.status, first.reason) == (
        "CONFLICT", "tuner 'wanted' is also offered by swift-plugin-second 0.2.0; set tuner.provider"
    )  # fmt: skip
    assert (second.status, second.reason) == (
        "CONFLICT", "tuner 'wanted' is also offered by swift-plugin-first 0.1.0; set tuner.provider"
    )  # fmt: skip
    with pytest.raises(RequestError) as caught:
        registry.find("tuners", "wanted")
    assert str(caught.value) == (
        "tuner 'wanted' is offered by swift-plugin-first 0.1.0 and by swift-plugin-second 0.2.0; "
        "choose with tuner.provider=NAME, or uninstall one."
    )
    assert registry.find("tuners", "wanted", "second").plugin is second


def test_not_installed_and_not_usable_read_differently(installed: Any) -> None:
    registry = Registry(build_index(installed("newer-api")))
    with pytest.raises(PluginLoadError) as unusable:
        registry.find("tuners", "newer")
    assert str(unusable.value) == (
        f"tuner 'newer' comes from swift-plugin-newer 0.1.0, which is installed but INCOMPATIBLE: {AT_INDEX['newer-api'][2]}"
    )
    with pytest.raises(RequestError) as absent:
        registry.find("tuners", "lora")
    assert str(absent.value) == "tuner 'lora' is not installed. Get it: pip install swift-plugin-lora"
    assert not isinstance(absent.value, PluginLoadError)


def test_an_unknown_id_points_to_plugins_whose_manifest_cannot_be_read(installed: Any) -> None:
    registry = Registry(build_index(installed("good", "bad-toml", "missing-manifest")))
    with pytest.raises(RequestError) as caught:
        registry.find("tuners", "garbled")
    assert str(caught.value) == (
        "no tuner 'garbled'. Installed: good. "
        "Installed but not usable: swift-plugin-garbled, swift-plugin-lost (see swift-core plugins list)."
    )


def test_list_shows_all_of_them_and_exits_0(installed: Any) -> None:
    installed("good", *CASES)
    result = swift_process("plugins", "list").ok()
    assert result.err == ""
    lines = result.out.splitlines()
    for name, _, reason in AT_INDEX.values():
        assert f"swift-plugin-{name}: {reason}" in lines
    assert f"swift-plugin-needy: {LACKS}" in lines
    found = rows("plugins", "list")
    statuses = {f"swift-plugin-{name}": status for name, status, _ in AT_INDEX.values()}
    statuses |= {"swift-plugin-first": "CONFLICT", "swift-plugin-second": "CONFLICT", "swift-plugin-good": "READY"}
    assert {name: found[name]["status"] for name in statuses} == statuses
    assert (found["swift-plugin-good"]["reason"], found["swift-plugin-good"]["provides"]) == ("", ["tuner:good"])


def test_lists_of_ids_hold_the_good_one(installed: Any) -> None:
    installed("good", *CASES)
    ids = {row["id"] for row in json.loads(swift_process("tuners", "list", "--json").ok().out)}
    assert "good" in ids
    assert not ids & {"lost", "garbled", "older", "newer"}


def test_check_names_every_fault_and_exits_1(installed: Any) -> None:
    installed("good", *CASES)
    result = swift_process("plugins", "check", "--json")
    assert result.code == 1
    faults = {row["name"]: row["fault"] for row in json.loads(result.out)}
    assert faults["swift-plugin-good"] == ""
    for name, status, reason in AT_INDEX.values():
        assert faults[f"swift-plugin-{name}"] == f"{status}: {reason}"
    for name, error in ON_ACTIVATION.values():
        assert faults[f"swift-plugin-{name}"] == error
    assert faults["swift-plugin-needy"] == f"LACKS: {LACKS}"
    broken = sum(bool(fault) for fault in faults.values())
    assert broken == len(CASES) + 1  # two-claims are two
    assert result.error == f"{broken} of {len(faults)} plugins cannot be used"


def test_check_of_a_sound_plugin_exits_0(installed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [*installed(*CASES), str(BROKEN.parent / "checked" / "sound")]
    monkeypatch.setenv("PYTHONPATH", ":".join(folders))
    assert swift_process("plugins", "check", "sound").ok().out == "swift-plugin-sound 0.1.0: ok (6 checks)\n"


@pytest.mark.parametrize("case", ON_ACTIVATION)
def test_train_with_a_broken_tuner_is_one_line_and_exits_2(installed: Any, case: str, tmp_path: Path) -> None:
    ident, error = ON_ACTIVATION[case]
    installed(case)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    result = swift_process("train", "--model", tmp_path / "model", "--dataset", "x.jsonl", "--tuner", ident)
    assert (result.code, result.error) == (2, error)
