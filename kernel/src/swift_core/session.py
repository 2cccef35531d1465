"""Owns what a run is made of: resolves names, activates plugins, opens each thing once, closes all in reverse.

Lifecycle: index -> resolve -> check -> activate -> run -> close. Everything here is reached through hooks; nothing is known
about any model, tuner or backend.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from swift_core import types
from swift_core.activate import Activator, load_options
from swift_core.config import DEFAULT_MODEL, CliText, Component, RunConfig, coerce, dump_options
from swift_core.errors import CapabilityError, RequestError, did_you_mean
from swift_core.events import EventSink
from swift_core.index import build_index
from swift_core.models import ModelRef, resolve_model
from swift_core.plan import Plan
from swift_core.registry import Contribution, Registry
from swift_core.source import Source, split_sample

T = TypeVar("T")


@dataclass(frozen=True)
class Opened:
    """An engine on a run's model. One behind an address has no `ref`, and a template of its own there: `template` is None."""

    name: str
    engine: types.Engine
    template: types.Template | None = None
    ref: ModelRef | None = None


@dataclass(frozen=True)
class Chosen:
    """A component after resolution: who answers for it, and its checked options."""

    contribution: Contribution
    options: Any

    @property
    def id(self) -> str:
        return self.contribution.id


class FrozenModel:
    """A TunedModel of a role that is not trained: reference, reward, teacher."""

    def __init__(self, bundle: types.ModelBundle) -> None:
        self.bundle, self.model = bundle, bundle.model
        self.model.requires_grad_(False)

    def trainable(self) -> dict[str, Any]:
        return {}

    def param_groups(self, config: Any) -> list[dict[str, Any]]:
        return []

    def make_optimizer(self, groups: list[dict[str, Any]]) -> None:
        return None

    def before_step(self, step: int) -> None: ...

    def after_step(self, step: int) -> None: ...

    @contextmanager
    def disabled(self) -> Iterator[None]:
        yield

    def save(self, folder: Path) -> None:
        raise CapabilityError("a frozen model has nothing to save")

    def load(self, folder: Path) -> None:
        raise CapabilityError("a frozen model has nothing to load")

    def merge(self) -> types.ModelBundle:
        return self.bundle


class DisabledPolicy(FrozenModel):
    """The policy with what was tuned switched off: the reference, unless the run names another. Its model is the policy's own,
    and only `within()` what the role means."""

    def __init__(self, policy: types.TunedModel) -> None:
        self.model, self.within = policy.model, policy.disabled


class Session:
    """One process's view of a run. Use as a context manager: leaving it closes the backend, engines and models."""

    def __init__(self, config: RunConfig, events: EventSink | None = None, registry: Registry | None = None) -> None:
        self.config = config
        self.events = events or EventSink(config.strict)
        self.registry = registry or Registry(build_index())
        self.activator = Activator()
        self.used: dict[str, str] = {}  # plugins by name, with their versions
        self._stack = ExitStack()
        self._roles: dict[str, types.TunedModel] = {}
        self._processors: dict[str, types.Processor] = {}

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self._roles.clear()
        self._stack.close()
        self.events.emit("closed")

    # --- names --------------------------------------------------------------------------------------------------------

    def choose(self, kind: str, component: Component, default: str | None = None) -> Chosen:
        """Resolve a component and check its options. `kind` is the manifest's table."""
        contribution = self.registry.find(kind, component.name or default or "", component.provider)
        return self._chosen(contribution, component.options)

    def _chosen(self, contribution: Contribution, options: dict[str, Any]) -> Chosen:
        self.used[contribution.plugin.name] = contribution.plugin.version
        return Chosen(contribution, load_options(contribution, options))

    @cached_property
    def model_ref(self) -> ModelRef:
        """The run's model. Without a name it is the embedded default, and that is said."""
        component = self.config.model
        if component.name is None:
            self.events.note(f"model: {DEFAULT_MODEL} (the default; choose another with --model)")
            component = replace(component, name=DEFAULT_MODEL)
        ref = resolve_model(self.registry, component)
        self._loader(ref)
        return ref

    def _loader(self, ref: ModelRef) -> Chosen:
        if ref.family:
            self.used[ref.family.plugin.name] = ref.family.plugin.version
        chosen = self._chosen(ref.loader, ref.options)
        if chosen.options is not None:
            for flag in ("trust_remote_code", "allow_pickle"):  # the run's flags, never a component's option
                object.__setattr__(chosen.options, flag, getattr(self.config, flag))  # a frozen dataclass too
        return chosen

    @cached_property
    def trainer(self) -> Chosen:
        return self.choose("trainers", self.config.trainer)

    @property
    def trainer_template(self) -> str | None:
        """The template that the trainer's manifest names: used unless the user names another."""
        named: str | None = self.trainer.contribution.entry.options.get("template")
        return named

    def resolve_all(self) -> Plan:
        """Resolve, check and activate every component of a training run; the plan of it."""
        task = self.trainer.contribution.entry.options.get("task")  # what the trainer's models are loaded for
        if task:
            self.config.model = replace(self.config.model, options={"task": task} | self.config.model.options)
        ref = self.model_ref
        # An adapter of an earlier run brings its tuner along; a new run on top of it is asked for with --from.
        if ref.adapter:
            raise RequestError(
                f"model {ref.name} is an adapter; train the base model with --from {ref.name}, or merge it first"
            )
        chosen = {"trainer": self.trainer, "template": self.template_choice(ref, self.trainer_template)}
        rolls_out = self.trainer.contribution.entry.options.get("engine")  # a trainer that has answers made
        for kind in ("tuner", "backend", "quantizer", *(["engine"] if rolls_out else [])):
            if (component := getattr(self.config, kind)).name:
                chosen[kind] = self.choose(f"{kind}s", component)
        callbacks = [self.choose("callbacks", component) for component in self.config.callbacks]
        self.choose("parts", Component("preparer/standard"))  # the plan names its version too
        self.activator.activate([ref.loader, *(item.contribution for item in [*chosen.values(), *callbacks])])
        components: dict[str, Any] = {
            kind: {"name": item.id, "plugin": item.contribution.plugin.name, "options": dump_options(item.options)}
            for kind, item in chosen.items()
        }
        # What a language model was trained with need not be what it answers with; a model with a head knows only one.
        components["template"]["of_trainer"] = chosen["template"].id == self.trainer_template and not task
        named = str(Path(ref.name).resolve()) if Path(ref.name).is_dir() else ref.name
        options = dump_options(self._loader(ref).options)
        components["model"] = {"name": named, "plugin": ref.loader.plugin.name, "options": options}
        components["model"] |= {"architecture": ref.architecture, "source": ref.source}
        return Plan(components, dict(sorted(self.used.items())))

    # --- data ---------------------------------------------------------------------------------------------------------

    def sources(self, components: list[Component], key: str = "dataset") -> list[Source]:
        """Opened data sets, with how each is to be sampled and weighted."""
        found = []
        for number, component in enumerate(components):
            name, sample = split_sample(component.name or "")
            options = dict(component.options)
            address = f"{key}.{number}"
            sample = coerce(options.pop("sample", sample), int | None, f"{address}.sample")
            weight = coerce(options.pop("weight", 1.0), float, f"{address}.weight")
            if weight <= 0:
                raise RequestError(f"{address}.weight: expected a number above 0, not {weight}")
            if self.registry.has("datasets", name) and not Path(name).exists():
                entry = self.registry.find("datasets", name, component.provider)
                if entry.entry.options.get("generic"):
                    raise RequestError(f"{address}: {name!r} opens files; give the file, folder or hub id itself")
            else:
                entry = self.registry.generic("datasets", component.provider)
                options["path"] = CliText(name)
            chosen = self._chosen(entry, options)
            try:
                opened = self.call(chosen, "swift_open_dataset", types.Dataset)
            except RequestError as err:
                if Path(name).exists():
                    raise
                raise self._no_dataset(name, err) from err
            found.append(Source(name, opened, sample, weight, key == "eval_dataset", component=chosen))
        return found

    def records(self, components: list[Component], key: str = "dataset") -> list[types.Record]:
        """All records of some data sets, each sampled and weighted. Raises RequestError when there is none."""
        found: list[types.Record] = []
        for source in self.sources(components, key):
            if source.sample is not None:
                source.draw(self.config.seed, self.events.warn)
            records = list(self.events.track(source.records(), f"reading {source.name}"))
            if not records:
                raise RequestError(f"{source.label} is empty: it has no rows")
            found += records
        return found

    def _no_dataset(self, name: str, err: RequestError) -> RequestError:
        """What is said of a name that is no file: that its plugin is missing or broken, or which id is near it."""
        if lack := self.registry.missing("datasets", name):
            return lack
        ids = [c.id for c in self.registry.all("datasets") if not c.entry.options.get("generic")]
        return RequestError(f"{err}{did_you_mean(name, ids)}")

    @cached_property
    def preparer(self) -> types.Preparer:
        preparer: types.Preparer = self.part("preparer", "standard")
        self._stack.callback(preparer.close)
        return preparer

    def prepare(self, template: types.Template) -> tuple[types.Data, Any]:
        """Read and encode what the run trains and evaluates on; the data, and the account of its rows."""
        if not self.config.dataset:
            raise RequestError("dataset is missing: --dataset FILE, a folder, or an id of `swift-core datasets list`")
        for name, value, least in (("window", self.config.window, 1), ("data_workers", self.config.data_workers or 0, 0)):
            if value < least:
                raise RequestError(f"{name}: expected at least {least}, not {value}")
        return self.preparer.prepare(self, template)

    # --- models -------------------------------------------------------------------------------------------------------

    def call(self, chosen: Chosen, hook: str, protocol: type[T], **kwargs: Any) -> T:
        """A hook for a chosen component: its id goes in as `tuner_id` and so on, its options as `config`."""
        kwargs = {f"{chosen.contribution.entry.singular}_id": chosen.id, "config": chosen.options} | kwargs
        return self.activator.call(chosen.contribution, hook, protocol, **kwargs)

    def processor(self, ref: ModelRef) -> types.Processor:
        if ref.source not in self._processors:
            self._processors[ref.source] = self.call(self._loader(ref), "swift_load_processor", object, source=ref.source)
        return self._processors[ref.source]

    def template_choice(self, ref: ModelRef, default: str | None = None) -> Chosen:
        """The template asked for, else the one that the model was trained with, else the trainer's, else the family's."""
        component, named = self.config.template, self.config.template.name or self.config.template.options
        if ref.plan and not named and not ref.plan.components["template"]["of_trainer"]:
            component = ref.plan.component("template")
        chosen = self.registry.find("templates", component.name or default or ref.template_id, component.provider)
        known = (ref.family.entry.options if ref.family else {}) | ref.options
        given = {name: known[name] for name in chosen.entry.options.get("from_model", ()) if name in known}
        for name, value in given.items():  # one for the whole family, or a table of them by architecture
            if isinstance(value, dict) and value and all(isinstance(own, dict) for own in value.values()):
                given[name] = value.get(ref.architecture, {})
        return self._chosen(chosen, given | component.options)

    def template(self, ref: ModelRef, processor: types.Processor, default: str | None = None) -> types.Template:
        chosen = self.template_choice(ref, default)
        return self.call(chosen, "swift_make_template", types.Template, processor=processor)

    def training_template(self) -> types.Template:
        """The template that a training run renders its rows with."""
        return self.template(self.model_ref, self.processor(self.model_ref), self.trainer_template)

    @cached_property
    def backend(self) -> types.Backend:
        backend = self.call(self.choose("backends", self.config.backend), "swift_open_backend", types.Backend)
        self._stack.callback(backend.close)
        return backend

    def quantizer(self, ref: ModelRef) -> types.Quantizer | None:
        """The run's quantizer, else that of the adapter's plan, else the one that wrote the folder, where it is a plugin's."""
        component = self.config.quantizer
        if component.name is None and ref.plan and "quantizer" in ref.plan.components:
            component = ref.plan.component("quantizer")
        if ref.quantization and self.registry.has("quantizers", ref.quantization):
            if component.name not in (None, ref.quantization):
                raise RequestError(
                    f"model {ref.name} is quantized by {ref.quantization}; quantizer {component.name} cannot be added"
                )
            component = replace(component, name=ref.quantization)
        if component.name is None:
            return None
        return self.call(self.choose("quantizers", component), "swift_make_quantizer", types.Quantizer)

    def bundle(self, ref: ModelRef, quantizer: types.Quantizer | None = None) -> types.ModelBundle:
        """Load a model with its processor and template: the quantizer's arguments, the loader, the quantizer."""
        with self.events.task(f"loading {ref.name}"):
            chosen, processor, quantizer = self._loader(ref), self.processor(ref), quantizer or self.quantizer(ref)
            load_kwargs = self.backend.load_kwargs() | (quantizer.load_kwargs(ref.source) if quantizer else {})
            bundle = self.call(
                chosen, "swift_load_model", types.ModelBundle, source=ref.source, processor=processor,
                backend=self.backend, load_kwargs=load_kwargs,
            )  # fmt: skip
            if quantizer:
                bundle = quantizer.apply(bundle, ref.source)
        bundle.template = bundle.template or self.template(ref, processor)
        if bundle.parts and ref.family and (patterns := ref.family.entry.options.get("parts")):
            bundle.parts = bundle.parts.overridden(patterns)
        return bundle

    def tuned(self, bundle: types.ModelBundle, tuner: Component, freeze: Sequence[str] = ()) -> types.TunedModel:
        """`freeze`: those of it that are parts of the model are none of the tuner's business."""
        bundle.frozen = [part for part in freeze if bundle.parts and part in bundle.parts.names]
        return self.call(self.choose("tuners", tuner), "swift_apply_tuner", types.TunedModel, bundle=bundle)

    def checkpoint(self, ref: ModelRef) -> types.TunedModel | None:
        """The model with what was trained on top of it; None where nothing was: then `bundle` loads it whole.

        An adapter of another tool is taken by the tuner that its type names, with the options of its own config.
        """
        if ref.adapter is None:
            return None
        foreign = Component(ref.adapter_type, options={"like": str(ref.adapter)})
        tuner, freeze = (ref.plan.component("tuner"), ref.plan.config.get("freeze", [])) if ref.plan else (foreign, [])
        tuned = self.tuned(self.bundle(ref), tuner, freeze)
        tuned.load(ref.adapter)
        return tuned

    def get(self, role: str) -> types.TunedModel:
        """The model of a role, loaded on first use (`run.models.get`)."""
        if role not in self._roles:
            if role == "policy":
                bundle = self.bundle(self.model_ref)
                tuned = self.tuned(bundle, self.config.tuner, self.config.freeze)
                self._freeze(tuned, bundle)
                self._roles[role] = tuned
            elif role == "value":
                self._roles[role] = self.checkpoint(ref := self._value_ref()) or self.tuned(self.bundle(ref), self.config.tuner)
            elif role in self.config.models:
                ref = resolve_model(self.registry, self.config.models[role])
                self._roles[role] = FrozenModel(self.tuned_bundle(t, ref) if (t := self.checkpoint(ref)) else self.bundle(ref))
            elif role == "reference":
                self._roles[role] = DisabledPolicy(self.get("policy"))
            else:
                raise RequestError(f"the run needs a model for the role {role!r}: set models.{role}")
        return self._roles[role]

    def _value_ref(self) -> ModelRef:
        """The model that says a number at each token: named by `models.value`, else the policy's with another head."""
        head, named = {"task": "token_classification", "num_labels": 1}, self.config.models.get("value")
        ref = resolve_model(self.registry, named) if named else self.model_ref  # whose options say what the policy's head is
        return replace(ref, options=head | ref.options if named else ref.options | head)

    def _freeze(self, tuned: types.TunedModel, bundle: types.ModelBundle) -> None:
        for part in self.config.freeze:
            if bundle.parts and part in bundle.frozen:  # a tuner that knows parts has left it alone
                for name, parameter in tuned.trainable().items():
                    parameter.requires_grad_(part not in bundle.parts.of(name))
                continue
            pattern = part[3:] if part.startswith("re:") else f"^{re.escape(part)}"
            try:
                matched = [parameter for name, parameter in tuned.trainable().items() if re.search(pattern, name)]
            except re.error as err:
                raise RequestError(f"freeze: {part!r} is not a regular expression: {err}") from None
            if not matched:
                first = next(iter(tuned.trainable()), "none")
                known = bundle.parts.names if bundle.parts and part.isidentifier() else []
                parts = f"; the model's parts: {', '.join(known)}" if known else ""
                raise RequestError(f"freeze: no trained parameter's name begins with {part!r}; the first is {first}{parts}")
            for parameter in matched:
                parameter.requires_grad_(False)

    def model_with(self, adapter: str | None) -> ModelRef:
        """The run's model with the adapter of a folder on top. Raises RequestError where that folder holds none."""
        ref = self.model_ref
        if adapter is None:
            return ref
        found = resolve_model(self.registry, Component(adapter))
        if found.adapter is None:
            raise RequestError(f"adapter {adapter}: no adapter is in this folder")
        return replace(ref, adapter=found.adapter, plan=found.plan, adapter_type=found.adapter_type)

    def opened(self, adapter: str | None = None) -> Opened:
        """The run's engine, on its model or at the address that stands in its place."""
        chosen = self.choose("engines", self.config.engine)
        if chosen.contribution.entry.options.get("takes") != "url":
            ref = self.model_with(adapter)
            return Opened(ref.name, self.engine(ref), self.template(ref, self.processor(ref)), ref)
        address = self.config.model.name
        if adapter is not None:
            raise RequestError(f"engine {chosen.id} speaks to a server: an adapter is chosen there, by a model's name")
        if address is None or not re.match(r"https?://", address):
            raise RequestError(f"engine {chosen.id} speaks to a server: give its address, --model http://HOST:PORT/v1")
        return Opened(address, self.open_engine(chosen, address))

    def engine(self, ref: ModelRef) -> types.Engine:
        """An engine on a model, what was trained on top of it included."""
        chosen = self.choose("engines", self.config.engine)
        takes = chosen.contribution.entry.options.get("takes", "bundle")
        if takes == "url":
            raise RequestError(f"engine {chosen.id} speaks to a server, and this needs a model that is at hand")
        if takes == "folder":
            if ref.folder is None:
                raise RequestError(f"engine {chosen.id} takes a folder, and {ref.name} is the id of a hub: give a local folder")
            processor = self.processor(ref)
            template = self.template(ref, processor)
            return self.open_engine(chosen, types.ModelFolder(ref.source, processor, template, ref.architecture, ref.adapter))
        tuned = self.checkpoint(ref)
        return self.open_engine(chosen, self.tuned_bundle(tuned, ref) if tuned else self.bundle(ref))

    def policy_engine(self) -> types.Engine:
        """The run's engine for the policy while it is trained (`run.engine`): on the policy itself where the engine takes a
        bundle, else on the model as it was before, to which weights are sent."""
        chosen, ref = self.choose("engines", self.config.engine), self.model_ref
        if chosen.contribution.entry.options.get("takes", "bundle") == "bundle":
            return self.open_engine(chosen, replace(self.tuned_bundle(self.get("policy"), ref), in_training=True))
        return self.engine(ref)

    def tuned_bundle(self, tuned: types.TunedModel, ref: ModelRef) -> types.ModelBundle:
        """A tuned model, as it is, in the form that an engine takes."""
        template = self.template(ref, self.processor(ref))
        task = getattr(getattr(tuned, "bundle", None), "task", "causal_lm")
        return types.ModelBundle(tuned.model, self.processor(ref), ref.source, ref.architecture, template, task=task)

    def open_engine(self, chosen: Chosen, source: types.ModelBundle | types.ModelFolder | str) -> types.Engine:
        engine = self.call(chosen, "swift_make_engine", types.Engine, source=source)
        self._stack.callback(engine.close)
        return engine

    def part(self, kind: str, ident: str, run: types.Run | None = None, **options: Any) -> Any:
        """A small part by kind and id, made by its plugin with these options and checked against the kind's Protocol."""
        chosen = self.choose("parts", Component(f"{kind}/{ident}", options=options))
        return self.call(chosen, "swift_make_part", types.PART_PROTOCOLS.get(kind, object), kind=kind, part_id=ident, run=run)

    def callbacks(self, run: types.Run) -> list[types.Callback]:
        chosen = [self.choose("callbacks", component).contribution for component in self.config.callbacks]
        return self.activator.call_each(chosen, "swift_make_callbacks", run=run)
