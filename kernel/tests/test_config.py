"""The configuration: files, flags and overrides; components; options as the types of their dataclass."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from swift_core.config import (
    CliText,
    Component,
    RunConfig,
    build_options,
    coerce,
    describe_options,
    dump_options,
    load_config,
    option,
    parse_config,
    type_name,
)
from swift_core.errors import RequestError


@dataclass
class Options:
    rank: int = option(8, "rank of the update")
    dropout: float = option(0.0, "share of inputs set to 0")
    targets: list[str] = option(["all-linear"], "layers")
    init: Literal["default", "gaussian"] = option("default", "first values")
    limit: int | None = option(None, "at most")
    resume: bool | str = option(False, "go on")
    extra: dict[str, int] = option({}, "more")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")


def load(tmp_path: Path, *arguments: str, flags: dict[str, Any] | None = None) -> RunConfig:
    """`arguments` are YAML texts, then KEY=VALUE overrides."""
    files = []
    for number, text in enumerate(argument for argument in arguments if ":" in argument):
        files.append(tmp_path / f"{number}.yaml")
        files[-1].write_text(text)
    return load_config(files, [argument for argument in arguments if ":" not in argument], flags)


def error(*arguments: Any, **keywords: Any) -> str:
    function, *rest = arguments
    with pytest.raises(RequestError) as caught:
        function(*rest, **keywords)
    return str(caught.value)


# --- options ----------------------------------------------------------------------------------------------------------


def test_options_take_their_types() -> None:
    raw = {"rank": CliText("16"), "dropout": CliText("1e-1"), "targets": CliText("q,v"), "limit": CliText("null")}
    options = build_options(Options, raw, "tuner.lora")
    assert options == Options(rank=16, dropout=0.1, targets=["q", "v"], limit=None)


def test_a_mutable_default_is_each_instances_own() -> None:
    Options().targets.append("x")
    assert Options().targets == ["all-linear"]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"rnak": 8}, "tuner.lora: unknown option 'rnak'. Did you mean: rank?"),
        (
            {"colour": 1},
            "tuner.lora: unknown option 'colour'. It has: dropout, extra, init, limit, rank, resume, targets.",
        ),
        ({"rank": "many"}, "tuner.lora.rank: expected whole number, not 'many'"),
        ({"rank": 1.5}, "tuner.lora.rank: expected whole number, not '1.5'"),
        ({"rank": float("inf")}, "tuner.lora.rank: expected whole number, not 'inf'"),
        ({"rank": True}, "tuner.lora.rank: expected whole number, not 'True'"),
        ({"rank": 0}, "tuner.lora: rank must be at least 1, not 0"),
        ({"init": "zero"}, "tuner.lora.init: expected one of default, gaussian, not 'zero'"),
        ({"limit": "x"}, "tuner.lora.limit: expected whole number or nothing, not 'x'"),
        ({"targets": [[1]]}, "tuner.lora.targets.0: expected text, not list"),
        ({"extra": {"a": "b"}}, "tuner.lora.extra.a: expected whole number, not 'b'"),
        ({"dropout": {}}, "tuner.lora.dropout: expected number, not dict"),
    ],
)
def test_a_wrong_option_names_its_address(raw: dict[str, Any], message: str) -> None:
    assert error(build_options, Options, raw, "tuner.lora") == message


def test_a_component_without_options_has_none() -> None:
    assert build_options(None, {}, "tuner.x") is None
    assert error(build_options, None, {"rank": 8}, "tuner.x") == "tuner.x: unknown option 'rank'; it has none"


def test_an_option_without_default_must_be_set() -> None:
    @dataclass
    class Needs:
        path: str
        hidden: int = field(default=0, init=False)

    globals()["Needs"] = Needs
    assert error(build_options, Needs, {}, "dataset.x") == "dataset.x: option 'path' must be set"


def test_describe_and_dump() -> None:
    rows = {name: (kind, default, text) for name, kind, default, text in describe_options(Options)}
    assert rows["rank"] == ("whole number", 8, "rank of the update")
    assert rows["targets"] == ("list of text", ["all-linear"], "layers")
    assert rows["limit"] == ("whole number or nothing", None, "at most")
    assert rows["extra"] == ("mapping", {}, "more")
    assert describe_options(None) == []
    assert dump_options(None) == {}
    assert dump_options(Options(rank=2))["rank"] == 2


@pytest.mark.parametrize(
    ("value", "hint", "result"),
    [
        ("1e-4", float, 1e-4),  # YAML 1.1 reads it as text
        (CliText("1e-4"), float, 1e-4),
        (3, float, 3.0),
        (CliText("2.0"), int, 2),
        (CliText("true"), bool, True),
        (CliText("true"), bool | str, True),
        (CliText("runs/x"), bool | str, "runs/x"),
        (CliText("8"), str, "8"),
        (CliText("[1, 2]"), list[int], [1, 2]),
        (CliText("1,2"), list[float], [1.0, 2.0]),
        (7, list[int], [7]),
        ("one", list[str], ["one"]),
        (CliText("{a: 1}"), dict[str, int], {"a": 1}),
        (CliText("null"), int | None, None),
        (None, int | None, None),
        (CliText("8"), Literal[4, 8], 8),
        (CliText("{a: [1]}"), Any, {"a": [1]}),
        ("as it is", Any, "as it is"),
    ],
)
def test_coerce(value: Any, hint: Any, result: Any) -> None:
    made = coerce(value, hint, "x")
    assert (made, type(made)) == (result, type(result))


@pytest.mark.parametrize(
    ("hint", "text"), [(int, "whole number"), (str | None, "text or nothing"), (list[float], "list of number"), (Path, "Path")]
)
def test_type_name(hint: Any, text: str) -> None:
    assert type_name(hint) == text


# --- components -------------------------------------------------------------------------------------------------------


def test_a_bare_string_is_a_name() -> None:
    assert Component.parse("lora", "tuner") == Component("lora")
    mapping = {"name": "lora", "provider": "fork", "rank": 8}
    assert Component.parse(mapping, "tuner") == Component("lora", "fork", {"rank": 8})
    assert Component.parse(mapping, "tuner").dump() == mapping
    assert error(Component.parse, [1], "tuner") == "tuner: expected a name or a mapping, not list"


def test_a_list_holds_several_components() -> None:
    config = parse_config({"dataset": ["a.jsonl", {"name": "b.jsonl", "weight": 2}], "callbacks": "bell"})
    assert config.dataset == [Component("a.jsonl"), Component("b.jsonl", options={"weight": 2})]
    assert config.callbacks == [Component("bell")]
    assert error(parse_config, {"dataset": [3]}) == "dataset.0: expected a name or a mapping, not '3'"


def test_defaults() -> None:
    config = parse_config({"tuner": {"rank": 2}})
    assert config.tuner == Component("lora", options={"rank": 2})
    assert (config.trainer.name, config.backend.name, config.seed) == ("sft", "torch", 42)


def test_roles() -> None:
    assert parse_config({"models": {"teacher": "./big"}}).models == {"teacher": Component("./big")}
    assert error(parse_config, {"models": ["./big"]}) == "models: expected a mapping from role to model"


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"tunr": "lora"}, "config: unknown option 'tunr'. Did you mean: tuner?"),
        ({"frm": "x"}, "config: unknown option 'frm'. Did you mean: from?"),
        ({"seed": "x"}, "seed: expected whole number, not 'x'"),
        ({"bad_rows": "drop"}, "bad_rows: expected one of stop, skip, not 'drop'"),
    ],
)
def test_a_wrong_key_is_guessed(tree: dict[str, Any], message: str) -> None:
    assert error(parse_config, tree) == message


def test_from_is_written_and_read_as_from() -> None:
    config = parse_config({"from": "runs/x"})
    assert config.warm_start == "runs/x"
    assert config.dump()["from"] == "runs/x"
    assert parse_config(config.dump()) == config


# --- files, flags and overrides ---------------------------------------------------------------------------------------


def test_later_wins(tmp_path: Path) -> None:
    config = load(
        tmp_path, "tuner: {name: lora, rank: 8, alpha: 4}\nseed: 1", "tuner: {rank: 16}", "tuner.alpha=2", flags={"seed": 3}
    )
    assert config.tuner == Component("lora", options={"rank": 16, "alpha": "2"})
    assert config.seed == 3


def test_a_list_is_replaced_whole(tmp_path: Path) -> None:
    config = load(tmp_path, "dataset: [a, b]", "dataset: [c]")
    assert config.dataset == [Component("c")]


def test_another_name_drops_the_options_of_the_old(tmp_path: Path) -> None:
    text = "tuner: {name: lora, rank: 8}"
    assert load(tmp_path, text, flags={"tuner": "full"}).tuner == Component("full")
    assert load(tmp_path, text, flags={"tuner": "lora"}).tuner == Component("lora", options={"rank": 8})
    assert load(tmp_path, text, "tuner=full").tuner == Component("full")
    assert load(tmp_path, text, "tuner: {name: full, share: 0.5}").tuner == Component("full", options={"share": 0.5})


def test_a_bare_name_in_a_file_is_a_name_for_the_next_file(tmp_path: Path) -> None:
    assert load(tmp_path, "tuner: full", "tuner: {share: 0.5}").tuner == Component("full", options={"share": 0.5})
    assert load(tmp_path, "tuner: {name: lora, rank: 8}", "tuner: lora").tuner == Component("lora", options={"rank": 8})
    assert load(tmp_path, "tuner: {name: lora, rank: 8}", "tuner: full").tuner == Component("full")


def test_an_override_is_text_until_its_type_is_known(tmp_path: Path) -> None:
    config = load(tmp_path, "tuner.rank=16", "trainer.learning_rate=1e-4", "seed=7")
    assert isinstance(config.tuner.options["rank"], CliText)
    assert build_options(Options, config.tuner.options, "tuner.lora") == Options(rank=16)
    assert config.seed == 7


def test_an_override_of_a_list(tmp_path: Path) -> None:
    assert load(tmp_path, "dataset.weight=2", flags={"dataset": ("a",)}).dataset == [Component("a", options={"weight": "2"})]
    two = {"dataset": ("a", "b")}
    assert load(tmp_path, "dataset.1.weight=2", flags=two).dataset[1].options == {"weight": "2"}
    assert load(tmp_path, "dataset.0=c", flags=two).dataset == [Component("c"), Component("b")]
    assert error(load, tmp_path, "dataset.weight=2", flags=two) == (
        "dataset.weight: dataset is a list of 2; say which: dataset.0.weight"
    )
    assert error(load, tmp_path, "dataset.2.weight=2", flags=two) == "dataset.2.weight: dataset has 2 entries, counted from 0"


def test_an_override_of_a_bare_name(tmp_path: Path) -> None:
    assert load(tmp_path, "tuner: lora", "tuner.rank=4").tuner == Component("lora", options={"rank": "4"})
    assert load(tmp_path, "models.teacher.revision=x").models == {"teacher": Component(None, options={"revision": "x"})}


def test_a_deep_override(tmp_path: Path) -> None:
    assert load(tmp_path, "template.kwargs.enable_thinking=false").template.options == {"kwargs": {"enable_thinking": "false"}}


@pytest.mark.parametrize("argument", ["x", "=1"])
def test_an_override_without_key_or_value(tmp_path: Path, argument: str) -> None:
    found = error(load, tmp_path, argument)
    assert found == f"{argument!r}: expected KEY=VALUE, such as tuner.rank=16, or the name of a .yaml file"


def test_an_override_of_what_has_no_parts(tmp_path: Path) -> None:
    assert error(load, tmp_path, "seed.x=1") == "seed: expected whole number, not dict"
    assert error(load, tmp_path, "seed: 1", "seed.x=1") == "seed.x: seed is not a mapping"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    assert error(load_config, [file], []) == f"{file}: no such file"
    file.write_text("- a")
    assert error(load_config, [file], []) == f"{file}: expected a mapping of options, not list"
    file.write_text("a: [")
    assert error(load_config, [file], []).startswith(f"{file}: not valid YAML: while parsing")
    file.write_text("")
    assert load_config([file], []) == RunConfig()


@pytest.mark.parametrize(("text", "read"), [("null", None), ("", None), (r"####\s*(\d+)", r"####\s*(\d+)"), ("# x", "# x")])
def test_text_that_yaml_takes_for_a_comment_stays_text(text: str, read: str | None) -> None:
    assert coerce(CliText(text), str | None, "evaluator.exact.extract") == read
