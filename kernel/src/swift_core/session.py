"""Owns what a run is made of: resolves names, activates plugins, opens each thing once, closes all in reverse.

Lifecycle: index -> resolve -> check -> activate -> run -> close. Everything here is reached through hooks; nothing is known
about any model, tuner or backend.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from swift_core import data, types
from swift_core.activate import Activator, load_options
from swift_core.config import DEFAULT_MODEL, CliText, Component, RunConfig, coerce, dump_options
from swift_core.errors import CapabilityError, RequestError, did_you_mean
from swift_core.events import EventSink
from swift_core.index import build_index
from swift_core.models import ModelRef, resolve_model
from swift_core.plan import Plan
from swift_core.registry import Contribution, Registry


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
    """The policy with what was tuned switched off: the reference, unless the run names another."""

    def __init__(self, policy: types.TunedModel) -> None:
        self.policy, self.model = policy, self

    def __call__(self, **inputs: Any) -> Any:
        with self.policy.disabled():
            return self.policy.model(**inputs)

    def to(self, device: Any) -> DisabledPolicy:
        return self

    def eval(self) -> DisabledPolicy:
        self.policy.model.eval()
        return self


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

    def resolve_all(self) -> Plan:
        """Resolve, check and activate every component of a training run; the plan of it."""
        ref = self.model_ref
        # An adapter of an earlier run brings its tuner along; a new run on top of it is asked for with --from.
        if ref.adapter:
            raise RequestError(
                f"model {ref.name} is an adapter; train the base model with --from {ref.name}, or merge it first"
            )
        chosen: dict[str, Chosen] = {"tuner": self.choose("tuners", self.config.tuner), "trainer": self.trainer}
        chosen["backend"] = self.choose("backends", self.config.backend)
        chosen["template"] = self.template_choice(ref, self.trainer.contribution.entry.options.get("template"))
        if self.config.quantizer.name:
            chosen["quantizer"] = self.choose("quantizers", self.config.quantizer)
        contributions = [item.contribution for item in chosen.values()]
        for component in self.config.callbacks:
            contributions.append(self.choose("callbacks", component).contribution)
        self.activator.activate([*contributions, ref.loader])
        components: dict[str, Any] = {
            kind: {"name": item.id, "plugin": item.contribution.plugin.name, "options": dump_options(item.options)}
            for kind, item in chosen.items()
        }
        components["template"]["of_trainer"] = chosen["template"].id == self.trainer.contribution.entry.options.get("template")
        named = str(Path(ref.name).resolve()) if Path(ref.name).is_dir() else ref.name
        components["model"] = {"name": named, "plugin": ref.loader.plugin.name, "options": dict(ref.options)}
        components["model"] |= {"architecture": ref.architecture, "source": ref.source}
        flags = {"trust_remote_code": self.config.trust_remote_code, "allow_pickle": self.config.allow_pickle}
        return Plan(components, dict(sorted(self.used.items())), flags, self.config.seed, list(self.config.freeze))

    # --- data ---------------------------------------------------------------------------------------------------------

    def records(self, components: list[Component], key: str = "dataset") -> list[types.Record]:
        """All records of some data sets, each sampled and weighted. Raises RequestError when there is none."""
        found: list[types.Record] = []
        for number, component in enumerate(components):
            name, sample = data.split_sample(component.name or "")
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
                opened = self.call(chosen, "swift_open_dataset", types.Dataset, dataset_id=chosen.id, config=chosen.options)
            except RequestError as err:
                if Path(name).exists():
                    raise
                raise self._no_dataset(name, err) from err
            records = list(self.events.track(opened, f"reading {name}"))
            if not records:
                raise RequestError(f"{key} {name!r} is empty: it has no rows")
            if sample is not None and sample > len(records):
                self.events.warn(f"{key} {name!r} has {len(records)} rows, {sample} were asked for")
            for record in (drawn := data.draw(records, sample, self.config.seed)):
                record.weight = weight
            found += drawn
        return found

    def _no_dataset(self, name: str, err: RequestError) -> RequestError:
        """What is said of a name that is no file: that its plugin is missing or broken, or which id is near it."""
        try:
            self.registry.find("datasets", name)
        except RequestError as lack:
            if "not installed" in str(lack) or "installed but" in str(lack):
                return lack
        ids = [c.id for c in self.registry.all("datasets") if not c.entry.options.get("generic")]
        return RequestError(f"{err}{did_you_mean(name, ids)}")

    def prepare(self, template: types.Template) -> tuple[types.Data, data.Account]:
        """Read and encode everything that the run trains and evaluates on."""
        if not self.config.dataset:
            raise RequestError("dataset is missing: --dataset FILE, a folder, or an id of `swift-core datasets list`")
        train = self.records(self.config.dataset)
        held = self.records(self.config.eval_dataset, "eval_dataset") if self.config.eval_dataset else []
        if not held:
            train, held = data.hold_out(train, self.config.holdout, self.config.seed)
        train = data.repeat(train, self.config.seed)  # after the hold-out: no row may stand on both sides
        return data.prepare(train, held, template, self.trainer.options, self.config.bad_rows, self.events)

    # --- models -------------------------------------------------------------------------------------------------------

    def call(self, chosen: Chosen, hook: str, protocol: type | None, **kwargs: Any) -> Any:
        """A hook for a chosen component: its id goes in as `tuner_id` and so on, its options as `config`."""
        kwargs = {f"{chosen.contribution.entry.singular}_id": chosen.id, "config": chosen.options} | kwargs
        return self.activator.call(chosen.contribution, hook, protocol, **kwargs)

    def processor(self, ref: ModelRef) -> types.Processor:
        if ref.source not in self._processors:
            self._processors[ref.source] = self.call(self._loader(ref), "swift_load_processor", None, source=ref.source)
        return self._processors[ref.source]

    def template_choice(self, ref: ModelRef, default: str | None = None) -> Chosen:
        """The template asked for, else the one that the model was trained with, else the trainer's, else the family's."""
        component, planned = self.config.template, ref.plan.components.get("template") if ref.plan else None
        if component.name is None and not component.options and planned and not planned["of_trainer"]:
            component = Component(planned["name"], planned["plugin"], planned["options"])
        return self.choose("templates", component, default or ref.template_id)

    def template(self, ref: ModelRef, processor: types.Processor, default: str | None = None) -> types.Template:
        chosen = self.template_choice(ref, default)
        made: types.Template = self.call(chosen, "swift_make_template", types.Template, processor=processor)
        return made

    @cached_property
    def backend(self) -> types.Backend:
        backend: types.Backend = self.call(self.choose("backends", self.config.backend), "swift_open_backend", types.Backend)
        self._stack.callback(backend.close)
        return backend

    def quantizer(self, ref: ModelRef) -> types.Quantizer | None:
        """The run's quantizer, else that of the adapter's plan, else the one that wrote the folder, where it is a plugin's."""
        component = self.config.quantizer
        planned = ref.plan.components.get("quantizer") if ref.plan else None
        if component.name is None and planned:
            component = Component(planned["name"], planned["plugin"], planned["options"])
        if ref.quantization and self.registry.has("quantizers", ref.quantization):
            if component.name not in (None, ref.quantization):
                raise RequestError(
                    f"model {ref.name} is quantized by {ref.quantization}; quantizer {component.name} cannot be added"
                )
            component = replace(component, name=ref.quantization)
        if component.name is None:
            return None
        chosen = self.choose("quantizers", component)
        made: types.Quantizer = self.call(chosen, "swift_make_quantizer", types.Quantizer)
        return made

    def bundle(self, ref: ModelRef, quantizer: types.Quantizer | None = None) -> types.ModelBundle:
        """Load a model with its processor and template: the quantizer's arguments, the loader, the quantizer."""
        chosen, processor, quantizer = self._loader(ref), self.processor(ref), quantizer or self.quantizer(ref)
        load_kwargs = self.backend.load_kwargs() | (quantizer.load_kwargs(ref.source) if quantizer else {})
        with self.events.task(f"loading {ref.name}"):
            bundle: types.ModelBundle = self.call(
                chosen, "swift_load_model", types.ModelBundle, source=ref.source, processor=processor,
                backend=self.backend, load_kwargs=load_kwargs,
            )  # fmt: skip
            if quantizer:
                bundle = quantizer.apply(bundle, ref.source)
        bundle.template = bundle.template or self.template(ref, processor)
        return bundle

    def tuned(self, bundle: types.ModelBundle, tuner: Component) -> types.TunedModel:
        made: types.TunedModel = self.call(self.choose("tuners", tuner), "swift_apply_tuner", types.TunedModel, bundle=bundle)
        return made

    def checkpoint(self, ref: ModelRef) -> types.TunedModel | None:
        """The model with what was trained on top of it; None where nothing was: then `bundle` loads it whole.

        An adapter of another tool is taken by the tuner that its type names, with the options of its own config.
        """
        if ref.adapter is None:
            return None
        if ref.plan:
            planned = ref.plan.components["tuner"]
            tuner = Component(planned["name"], planned["plugin"], planned["options"])
        else:
            tuner = Component(ref.adapter_type, options={"like": str(ref.adapter)})
        tuned = self.tuned(self.bundle(ref), tuner)
        tuned.load(ref.adapter)
        return tuned

    def get(self, role: str) -> types.TunedModel:
        """The model of a role, loaded on first use (`run.models.get`)."""
        if role not in self._roles:
            if role == "policy":
                tuned = self.tuned(self.bundle(self.model_ref), self.config.tuner)
                self._freeze(tuned)
                self._roles[role] = tuned
            elif role in self.config.models:
                self._roles[role] = FrozenModel(self.bundle(resolve_model(self.registry, self.config.models[role])))
            elif role == "reference":
                self._roles[role] = DisabledPolicy(self.get("policy"))
            else:
                raise RequestError(f"the run needs a model for the role {role!r}: set models.{role}")
        return self._roles[role]

    def _freeze(self, tuned: types.TunedModel) -> None:
        for part in self.config.freeze:
            pattern = part[3:] if part.startswith("re:") else f"^{re.escape(part)}"
            try:
                matched = [parameter for name, parameter in tuned.trainable().items() if re.search(pattern, name)]
            except re.error as err:
                raise RequestError(f"freeze: {part!r} is not a regular expression: {err}") from None
            if not matched:
                first = next(iter(tuned.trainable()), "none")
                raise RequestError(f"freeze: no trained parameter's name begins with {part!r}; the first is {first}")
            for parameter in matched:
                parameter.requires_grad_(False)

    def engine(self, ref: ModelRef) -> types.Engine:
        """An engine on a model, what was trained on top of it included."""
        chosen = self.choose("engines", self.config.engine)
        if chosen.contribution.entry.options.get("takes", "bundle") != "bundle":
            if ref.adapter:
                raise RequestError(f"engine {chosen.id} takes a whole model: merge {ref.name} with swift-core export first")
            return self.open_engine(chosen, ref.source)
        tuned = self.checkpoint(ref)
        return self.open_engine(chosen, self.tuned_bundle(tuned, ref) if tuned else self.bundle(ref))

    def tuned_bundle(self, tuned: types.TunedModel, ref: ModelRef) -> types.ModelBundle:
        """A tuned model, as it is, in the form that an engine takes."""
        template = self.template(ref, self.processor(ref))
        return types.ModelBundle(tuned.model, self.processor(ref), ref.source, ref.architecture, template)

    def open_engine(self, chosen: Chosen, source: types.ModelBundle | str) -> types.Engine:
        engine: types.Engine = self.call(chosen, "swift_make_engine", types.Engine, source=source)
        self._stack.callback(engine.close)
        return engine

    def part(self, kind: str, ident: str, run: types.Run | None = None) -> Any:
        """A small part by kind and id, made by its plugin and checked against the kind's Protocol."""
        chosen = self.choose("parts", Component(f"{kind}/{ident}"))
        return self.call(chosen, "swift_make_part", types.PART_PROTOCOLS.get(kind), kind=kind, part_id=ident, run=run)

    def evaluator(self) -> types.Evaluator:
        made: types.Evaluator = self.call(
            self.choose("evaluators", self.config.evaluator), "swift_make_evaluator", types.Evaluator
        )
        return made

    def callbacks(self, run: types.Run) -> list[types.Callback]:
        chosen = [self.choose("callbacks", component).contribution for component in self.config.callbacks]
        return self.activator.call_each(chosen, "swift_make_callbacks", run=run)
