"""Activation and calls: what is imported when, and how each fault is told, on the right plugin."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import pytest
from swift_core.activate import Activator, load_object, load_options, missing_members
from swift_core.errors import PluginError, PluginLoadError, RequestError, RunError
from swift_core.index import build_index
from swift_core.registry import Contribution, Registry

TUNER = '[[tuners]]\nid = "x"\nconfig = "swift_plugin_x.config:Config"\n'
HOOK = "from swift_core import hookimpl\n\n\n@hookimpl\ndef swift_apply_tuner(tuner_id, bundle, config):\n    "
CONFIG = (
    "from dataclasses import dataclass\nfrom swift_core.config import option\n\n\n"
    '@dataclass\nclass Config:\n    rank: int = option(8, "rank")\n'
)


@runtime_checkable
class Tuned(Protocol):
    model: Any

    def trainable(self) -> dict[str, Any]: ...


def find(folder: str, ident: str = "x", kind: str = "tuners") -> Contribution:
    return Registry(build_index([folder])).find(kind, ident)


def apply(contribution: Contribution, protocol: type = object, activator: Activator | None = None) -> Any:
    call = (activator or Activator()).call
    return call(contribution, "swift_apply_tuner", protocol, tuner_id=contribution.id, bundle="bundle", config=None)


def failure(error: type[Exception], function: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(error) as caught:
        function(*arguments)
    return str(caught.value)


def test_a_hook_is_called_with_what_it_names(make_plugin: Callable[..., str]) -> None:
    folder = make_plugin("x", TUNER, HOOK.replace("bundle, config", "bundle") + "return (tuner_id, bundle)\n")
    assert apply(find(folder)) == ("x", "bundle")


def test_only_what_is_named_is_imported(make_plugin: Callable[..., str]) -> None:
    make_plugin("y", '[[tuners]]\nid = "y"\n', 'raise AssertionError("must not be imported")\n')
    folder = make_plugin("x", TUNER, HOOK + "return 1\n")
    apply(find(folder))
    assert "swift_plugin_x.hooks" in sys.modules
    assert "swift_plugin_y" not in sys.modules
    assert "swift_plugin_x.config" not in sys.modules


def test_a_plugin_is_registered_once(make_plugin: Callable[..., str]) -> None:
    contribution, activator = find(make_plugin("x", TUNER, HOOK + "return 1\n")), Activator()
    activator.activate([contribution, contribution])
    activator.activate([contribution])
    assert [name for name, _ in activator.manager.list_name_plugin()] == ["swift-plugin-x"]


def test_a_plugin_of_commands_alone_has_no_hooks_to_import(make_plugin: Callable[..., str]) -> None:
    folder = make_plugin("x", '[[commands]]\nname = "go"\nhelp = "Go."\ntarget = "swift_plugin_x.go:go"\n', go="go = 7\n")
    contribution = find(folder, "go", "commands")
    assert load_object(contribution.entry.options["target"], contribution) == 7


def test_options_are_the_plugins_dataclass(make_plugin: Callable[..., str]) -> None:
    contribution = find(make_plugin("x", TUNER, HOOK + "return 1\n", config=CONFIG))
    assert load_options(contribution, {"rank": 4.0}).rank == 4
    assert failure(RequestError, load_options, contribution, {"rnk": 4}) == (
        "tuner.x: unknown option 'rnk'. Did you mean: rank?"
    )


def test_a_config_that_is_not_there(make_plugin: Callable[..., str]) -> None:
    contribution = find(make_plugin("x", TUNER, HOOK + "return 1\n", config="Other = 1\n"))
    assert failure(PluginLoadError, load_options, contribution, {}) == (
        "tuner 'x' comes from swift-plugin-x 1.0, which failed to import: AttributeError: "
        "module 'swift_plugin_x.config' has no attribute 'Config' (--debug shows the traceback)"
    )


def test_a_plugin_that_fails_to_register_leaves_the_next_one_working(make_plugin: Callable[..., str]) -> None:
    make_plugin("bad", '[[tuners]]\nid = "bad"\n', HOOK.replace("config", "colour") + "return 'never'\n")
    folder = make_plugin("x", TUNER, HOOK + "return 1 if tuner_id == 'x' else None\n")
    activator = Activator()
    assert "swift_apply_tuner has no argument 'colour'; it has: tuner_id, bundle, config" in failure(
        PluginLoadError, apply, find(folder, "bad"), object, activator
    )
    assert apply(find(folder), activator=activator) == 1
    assert [name for name, _ in activator.manager.list_name_plugin()] == ["swift-plugin-x"]


def test_a_hook_that_raises_names_plugin_and_hook_and_keeps_the_cause(make_plugin: Callable[..., str]) -> None:
    contribution = find(make_plugin("x", TUNER, HOOK + 'raise KeyError("lost\\nin two lines")\n'))
    with pytest.raises(PluginError) as caught:
        apply(contribution)
    assert str(caught.value) == r"swift-plugin-x failed in swift_apply_tuner: KeyError: 'lost\nin two lines'"
    assert (caught.value.plugin, caught.value.hook, caught.value.exit_code) == ("swift-plugin-x", "swift_apply_tuner", 1)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_hook_that_exits_is_caught(make_plugin: Callable[..., str]) -> None:
    contribution = find(make_plugin("x", TUNER, HOOK + "raise SystemExit(3)\n"))
    assert failure(PluginError, apply, contribution) == "swift-plugin-x failed in swift_apply_tuner: SystemExit: 3"


@pytest.mark.parametrize(("error", "kind"), [("RequestError", RequestError), ("RunError", RunError)])
def test_the_kernels_own_errors_pass_as_they_are(make_plugin: Callable[..., str], error: str, kind: type[Exception]) -> None:
    body = f'from swift_core.errors import {error}\n    raise {error}("rank is too high")\n'
    assert failure(kind, apply, find(make_plugin("x", TUNER, HOOK + body))) == "rank is too high"


def test_the_plugin_whose_code_raised_is_blamed(make_plugin: Callable[..., str]) -> None:
    """A wrapper of another plugin fails around the owner's hook."""
    wrapper = HOOK.replace("@hookimpl\n", "@hookimpl(wrapper=True)\n") + "yield\n    raise ValueError('wrapped badly')\n"
    make_plugin("wrap", '[[tuners]]\nid = "wrap"\n', wrapper)
    folder = make_plugin("x", TUNER, HOOK + "return 1\n")
    activator = Activator()
    activator.activate([find(folder, "wrap")])
    blamed = failure(PluginError, apply, find(folder), object, activator)
    assert blamed == "swift-plugin-wrap failed in swift_apply_tuner: ValueError: wrapped badly"


def test_none_for_an_id_that_is_claimed(make_plugin: Callable[..., str]) -> None:
    contribution = find(make_plugin("x", TUNER, HOOK + "return None\n"))
    assert failure(PluginError, apply, contribution) == (
        "swift-plugin-x failed in swift_apply_tuner: it claims 'x' in its manifest and returned None"
    )


def test_a_result_is_checked_against_its_protocol(make_plugin: Callable[..., str]) -> None:
    body = "class Half:\n        model = 1\n    return Half()\n"
    contribution = find(make_plugin("x", TUNER, HOOK + body))
    assert failure(PluginError, apply, contribution, Tuned) == (
        "swift-plugin-x failed in swift_apply_tuner: Half is not a Tuned: it lacks trainable"
    )
    assert missing_members(object(), Tuned) == "model, trainable"


CALLBACKS = "from swift_core import hookimpl\n\n\n@hookimpl\ndef swift_make_callbacks(run):\n    "


def test_every_plugin_named_makes_its_callbacks(make_plugin: Callable[..., str]) -> None:
    make_plugin("a", '[[callbacks]]\nid = "a"\n', CALLBACKS + "yield 'a1'\n    yield 'a2'\n")
    make_plugin("n", '[[callbacks]]\nid = "n"\n', CALLBACKS + "return None\n")
    folder = make_plugin("b", '[[callbacks]]\nid = "b"\n', CALLBACKS + "return [run]\n")
    chosen = [find(folder, ident, "callbacks") for ident in ("b", "n", "a")]
    assert Activator().call_each(chosen, "swift_make_callbacks", run="run") == ["a1", "a2", "run"]


def test_a_callback_that_cannot_be_made_names_its_own_plugin(make_plugin: Callable[..., str]) -> None:
    make_plugin("a", '[[callbacks]]\nid = "a"\n', CALLBACKS + "return []\n")
    folder = make_plugin("b", '[[callbacks]]\nid = "b"\n', CALLBACKS + "yield 1 / 0\n")
    chosen = [find(folder, ident, "callbacks") for ident in ("a", "b")]
    assert failure(PluginError, lambda: Activator().call_each(chosen, "swift_make_callbacks", run=1)) == (
        "swift-plugin-b failed in swift_make_callbacks: ZeroDivisionError: division by zero"
    )


def test_trace(make_plugin: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    contribution = find(make_plugin("x", TUNER, HOOK + "return 1\n"))
    apply(contribution)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("SWIFT_TRACE_HOOKS", "1")
    apply(contribution)
    assert capsys.readouterr().err.startswith("hook swift_apply_tuner(tuner_id='x', bundle='bundle', config=None) 0.0")
