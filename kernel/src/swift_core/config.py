"""The run's configuration: YAML nested by component, overrides by dotted path, options checked against dataclasses.

A component is a name and its options: `tuner: lora` or `tuner: {name: lora, rank: 8}`. Its options' dataclass comes from
the plugin that offers the name, so unknown options are found only after that plugin is known: see `build_options`.
"""

from __future__ import annotations

import dataclasses
import json
import types
from contextlib import suppress
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from swift_core.errors import RequestError, did_you_mean

T = TypeVar("T")


def option(default: Any, help: str) -> Any:
    """A field of an options dataclass with its help text. A mutable default is copied for each instance."""
    metadata = {"help": help}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class CliText(str):
    """A value typed on the command line: read as the option's type, else as YAML."""


@dataclass
class Component:
    """One chosen plugin contribution: its name (None: the default), who provides it, and its raw options."""

    name: str | None = None
    provider: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, value: Any, address: str) -> Component:
        if value is None or isinstance(value, str):
            return cls(None if value is None else str(value))
        if not isinstance(value, dict):
            raise RequestError(f"{address}: expected a name or a mapping, not {_kind(value)}")
        rest = dict(value)
        name, provider = rest.pop("name", None), rest.pop("provider", None)
        return cls(None if name is None else str(name), None if provider is None else str(provider), rest)

    def dump(self) -> dict[str, Any]:
        head: dict[str, Any] = {"name": self.name, "provider": self.provider}
        return {key: value for key, value in head.items() if value is not None} | self.options


DEFAULT_MODEL = "smollm2-135m-instruct"


@dataclass
class RunConfig:
    """Everything that can stand in a run's YAML file. Options of components are checked when the plugin is known."""

    model: Component = field(
        default_factory=Component, metadata={"help": f"a model id, a folder, a run folder, or a hub id [{DEFAULT_MODEL}]"}
    )
    dataset: list[Component] = field(default_factory=list, metadata={"help": "files, folders, ids; path#500 takes 500 rows"})
    eval_dataset: list[Component] = field(default_factory=list, metadata={"help": "rows to evaluate on, as for dataset"})
    template: Component = field(default_factory=Component, metadata={"help": "how rows become text"})
    tuner: Component = field(default_factory=lambda: Component("lora"), metadata={"help": "what is trained"})
    trainer: Component = field(default_factory=lambda: Component("sft"), metadata={"help": "the training loop"})
    backend: Component = field(default_factory=lambda: Component("torch"), metadata={"help": "device, precision, processes"})
    engine: Component = field(default_factory=lambda: Component("transformers"), metadata={"help": "what generates"})
    quantizer: Component = field(default_factory=Component, metadata={"help": "quantizes the base weights"})
    evaluator: Component = field(default_factory=lambda: Component("exact"), metadata={"help": "what scores"})
    callbacks: list[Component] = field(default_factory=list, metadata={"help": "callbacks to switch on"})
    models: dict[str, Component] = field(default_factory=dict, metadata={"help": "models of other roles, as for model"})
    output: str | None = field(default=None, metadata={"help": "the run's folder"})
    seed: int = option(42, "seed of every random generator")
    holdout: float = option(0.0, "rows kept back for evaluation: a share below 1, or a count")
    bad_rows: Literal["stop", "skip"] = option("stop", "what an unusable row does: stop the run, or be skipped and counted")
    stream: bool = option(False, "prepare the data window by window while training; needs trainer.max_steps")
    window: int = option(4096, "rows of a window of a stream")
    data_workers: int | None = option(None, "processes that prepare rows; default: up to four for much data")
    warm_start: str | None = option(None, "a checkpoint or run whose weights to begin with (written `from` in YAML)")
    freeze: list[str] = option([], "what stays as it is: vision, projector, language, ..., beginnings of names, or re:PATTERN")
    strict: bool = option(False, "a failing callback ends the run")
    trust_remote_code: bool = option(False, "let a checkpoint's own Python code run")
    allow_pickle: bool = option(False, "allow .bin weights, read with weights_only=True")

    def dump(self) -> dict[str, Any]:
        """As YAML would write it: plain values, options that are not set left out."""
        out: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            key = "from" if item.name == "warm_start" else item.name
            if isinstance(value, Component):
                value = value.dump()
            elif isinstance(value, list):
                value = [entry.dump() if isinstance(entry, Component) else entry for entry in value]
            elif isinstance(value, dict):
                value = {role: entry.dump() for role, entry in value.items()}
            if value not in ({}, None):
                out[key] = value
        plain: dict[str, Any] = json.loads(json.dumps(out, default=str))
        return plain


SINGLE = ("model", "template", "tuner", "trainer", "backend", "engine", "quantizer", "evaluator")
LISTS = ("dataset", "eval_dataset", "callbacks")


def load_config(files: list[Path], overrides: list[str], flags: dict[str, Any] | None = None) -> RunConfig:
    """Merge YAML files in order, then flags (`{"tuner": "lora"}`), then KEY=VALUE overrides.

    Raises RequestError naming the address of what is wrong.
    """
    tree: dict[str, Any] = {}
    for file in files:
        _merge(tree, {str(key): _normal(key, value) for key, value in _read_yaml(file).items() if value is not None})
    for key, value in (flags or {}).items():
        if value not in (None, (), []):
            _set(tree, [key], list(value) if isinstance(value, tuple) else value, key)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise RequestError(f"{text!r}: expected KEY=VALUE, such as tuner.rank=16, or the name of a .yaml file")
        _set(tree, key.split("."), CliText(value), key)
    return parse_config(tree)


def parse_config(tree: dict[str, Any]) -> RunConfig:
    """A RunConfig from a nested mapping."""
    tree = {("warm_start" if key == "from" else key): value for key, value in tree.items()}
    values: dict[str, Any] = {}
    hints = get_type_hints(RunConfig)
    known = ["from" if key == "warm_start" else key for key in hints]
    for key, value in tree.items():
        if key not in hints:
            raise RequestError(f"config: unknown option {key!r}.{did_you_mean(key, known)}")
        if key in SINGLE:
            default = RunConfig().__getattribute__(key).name
            values[key] = Component.parse(value, key)
            values[key].name = values[key].name or default
        elif key in LISTS:
            items = value if isinstance(value, list) else [value]
            values[key] = [Component.parse(item, f"{key}.{n}") for n, item in enumerate(items)]
        elif key == "models":
            if not isinstance(value, dict):
                raise RequestError("models: expected a mapping from role to model")
            values[key] = {role: Component.parse(item, f"models.{role}") for role, item in value.items()}
        else:
            values[key] = coerce(value, hints[key], "from" if key == "warm_start" else key)
    return RunConfig(**values)


def build_options(cls: type[T] | None, raw: dict[str, Any], address: str) -> T | None:
    """An options dataclass from raw values. Raises RequestError: `tuner.lora: unknown option 'rnak'. Did you mean: rank?`"""
    if cls is None:
        for key in raw:
            raise RequestError(f"{address}: unknown option {key!r}; it has none")
        return None
    hints = get_type_hints(cls)
    known = {item.name: item for item in dataclasses.fields(cls) if item.init}  # type: ignore[arg-type]
    values = {}
    for key, value in raw.items():
        if key not in known:
            suggestion = did_you_mean(key, known) or f" It has: {', '.join(sorted(known))}."
            raise RequestError(f"{address}: unknown option {key!r}.{suggestion}")
        values[key] = coerce(value, hints[key], f"{address}.{key}")
    for name, item in known.items():
        if name not in values and item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise RequestError(f"{address}: option {name!r} must be set")
    try:
        return cls(**values)
    except ValueError as err:
        raise RequestError(f"{address}: {err}") from None


def dump_options(options: Any) -> dict[str, Any]:
    """What can be set of an options dataclass, as plain values; {} for None."""
    known = {item.name for item in dataclasses.fields(options) if item.init} if options is not None else ()
    return {name: value for name, value in dataclasses.asdict(options).items() if name in known} if known else {}


def describe_options(cls: type | None) -> list[tuple[str, str, Any, str]]:
    """(name, type, default, help) of each option of a dataclass, for help texts and schemas."""
    if cls is None:
        return []
    hints = get_type_hints(cls)
    rows = []
    for item in (item for item in dataclasses.fields(cls) if item.init):
        default: Any = None if item.default is dataclasses.MISSING else item.default
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        rows.append((item.name, type_name(hints[item.name]), default, item.metadata.get("help", "")))
    return rows


def type_name(hint: Any) -> str:
    """`int | None`, `one of a, b`, `list of str`, as help texts and errors name a type."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join("nothing" if arg is type(None) else type_name(arg) for arg in get_args(hint))
    if origin is Literal:
        return "one of " + ", ".join(str(arg) for arg in get_args(hint))
    if origin is list:
        return f"list of {type_name(get_args(hint)[0])}"
    if origin is dict:
        return "mapping"
    return {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}.get(
        getattr(hint, "__name__", ""), getattr(hint, "__name__", str(hint))
    )


def coerce(value: Any, hint: Any, address: str) -> Any:
    """`value` as the type `hint`, or RequestError. Text is read as that type: the command line and config.yaml hold "3"."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for arg in sorted(args, key=lambda arg: arg is str):  # text last: it takes anything
            try:
                return coerce(value, arg, address)
            except RequestError:
                continue
    elif hint is Any:
        return _yaml(value) if isinstance(value, CliText) else value
    elif hint is str and isinstance(value, str):
        return str(value)
    elif origin is Literal:
        for arg in args:
            if value == arg or str(value) == str(arg):
                return arg
    elif origin is list:
        items = _yaml(value) if isinstance(value, str) else value
        if isinstance(items, (str, int, float)):
            items = [CliText(part.strip()) for part in str(value).split(",")]
        if isinstance(items, list):
            return [coerce(item, args[0], f"{address}.{n}") for n, item in enumerate(items)]
    elif origin is dict or hint is dict:
        items = _yaml(value) if isinstance(value, str) else value
        if isinstance(items, dict):
            return {key: coerce(item, args[1] if args else Any, f"{address}.{key}") for key, item in items.items()}
    else:
        plain = _yaml(value) if isinstance(value, str) else value
        if hint is type(None) and str(value).strip().lower() in ("", "~", "null", "none"):  # "# x" is no null, but text
            return None
        if hint is bool and isinstance(plain, bool):
            return plain
        if hint is int and (type(plain) is int or (type(plain) is float and plain.is_integer())):
            return int(plain)
        if hint is float and not isinstance(plain, bool):
            with suppress(TypeError, ValueError):  # YAML 1.1 reads 1e-4 as text
                if isfinite(number := float(plain)):
                    return number
    raise RequestError(f"{address}: expected {type_name(hint)}, not {_kind(value)}")


def _kind(value: Any) -> str:
    return f"{str(value)!r}" if isinstance(value, (str, int, float, bool)) else type(value).__name__


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return str(text)


def _read_yaml(file: Path) -> dict[str, Any]:
    import yaml

    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = "" if file.suffix in (".yaml", ".yml") else "; an option is written KEY=VALUE, and a configuration ends in .yaml"
        raise RequestError(f"{file}: no such file{hint}") from None
    except (OSError, UnicodeDecodeError) as err:
        raise RequestError(f"{file}: cannot be read: {err}") from None
    except yaml.YAMLError as err:
        raise RequestError(f"{file}: not valid YAML: {' '.join(str(err).split())}") from None
    if not isinstance(data or {}, dict):
        raise RequestError(f"{file}: expected a mapping of options, not {_kind(data)}")
    return data or {}


def _merge(tree: dict[str, Any], other: dict[str, Any]) -> None:
    """Mappings merge by key; anything else, lists included, is replaced whole."""
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict) and value.get("name") in (None, tree[key].get("name")):
            _merge(tree[key], value)
        else:
            tree[key] = value


def _normal(key: str, value: Any) -> Any:
    """A bare string is its component's name, and one component a list of one."""
    if key in SINGLE:
        return {"name": value} if isinstance(value, str) else value
    if key in LISTS:
        items = value if isinstance(value, list) else [value]
        return [{"name": item} if isinstance(item, str) else item for item in items]
    return value


def _set(tree: dict[str, Any], path: list[str], value: Any, address: str) -> None:
    """Set what a dotted path names. A component's name drops options that were written for another name."""
    head, rest = path[0], path[1:]
    if not rest:
        current = tree.get(head)
        if head in SINGLE and isinstance(current, dict) and current.get("name") in (None, str(value)):
            current["name"] = str(value)
        else:
            tree[head] = _normal(head, value)
        return
    current = tree.setdefault(head, [] if head in LISTS else {})
    if isinstance(current, str):
        current = tree[head] = {"name": current}
    if isinstance(current, list):
        if not rest[0].isdigit():
            if len(current) != 1:
                raise RequestError(f"{address}: {head} is a list of {len(current)}; say which: {head}.0.{'.'.join(rest)}")
            rest = ["0", *rest]
        if int(rest[0]) >= len(current):
            raise RequestError(f"{address}: {head} has {len(current)} entries, counted from 0")
        if len(rest) == 1:
            current[int(rest[0])] = {"name": value}
            return
        current, rest = current[int(rest[0])], rest[1:]
    if not isinstance(current, dict):
        raise RequestError(f"{address}: {head} is not a mapping")
    if rest[:-1]:
        _set(current, rest, value, address)
    else:
        current[rest[0]] = value
