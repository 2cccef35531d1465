"""The contracts: one class for each kind. A plugin's test inherits its kind's, and every check here runs on the plugin.

    class TestQwen(ModelContract):
        distribution, id, options = "swift-plugin-qwen", "qwen3", {}

Tensors are handled through their own methods: no torch here. Fixtures and `rows` may be overridden; a test only with
`@pytest.mark.xfail(reason=...)`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from swift_core import types as t
from swift_core.activate import Activator, load_object, load_options
from swift_core.api import KINDS
from swift_core.config import Component, RunConfig, parse_config
from swift_core.errors import CapabilityError, RequestError
from swift_core.events import Event, EventSink
from swift_core.index import READY, build_index, normalise
from swift_core.plan import Plan
from swift_core.registry import Contribution, Registry
from swift_core.session import Session
from swift_core.source import SampleList
from swift_core.testing import static

LAUNCHER = """
from swift_core.config import Component, RunConfig
from swift_core.session import Session
session = Session(RunConfig())
chosen = session.choose("backends", Component({!r}, options={!r}))
session.call(chosen, "swift_make_launcher", object)
"""
PAIRS = (("Who are you?", "A test."), ("Count.", "One, two, three, four."))
ROWS = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in PAIRS]
STEP = dict.fromkeys(("step", "steps", "loss", "learning_rate", "tokens_per_second", "seconds_left", "peak_bytes"), 1.0)
SUMMARY = {"steps", "seconds", "train_loss", "eval_loss", "trained_tokens", "tokens_per_second", "peak_bytes"}
EVENTS: dict[str, dict[str, Any]] = {"run": {}, "step": STEP, "eval": {"step": 1, "loss": 1.0}, "done": {}}


def run_walled(code: str) -> None:
    """Run Python code in a process of its own, where heavy libraries cannot be imported."""
    assert not (fault := static.walled(code)), fault


def logits(model: Any, batch: t.Batch) -> Any:
    return model.eval()(**batch.inputs).logits.detach()  # [B, T, V]


def gap(left: Any, right: Any) -> float:
    return float((left - right).abs().max())


def sum_loss(outputs: Any, batch: t.Batch) -> Any:
    """A `LossFn`: the mean loss of every next token, trained or not, times the batch's weight."""
    targets = batch.inputs["input_ids"][:, 1:].unsqueeze(-1)
    return -outputs.logits[:, :-1].log_softmax(-1).gather(-1, targets).mean() * batch.weight


class Contract:
    """What every contribution keeps to. `distribution`, `id` and `options` are the plugin's to set."""

    kind: ClassVar[str] = ""  # the manifest's table
    distribution: ClassVar[str] = ""
    id: ClassVar[str] = ""
    options: ClassVar[dict[str, Any]] = {}
    rows: ClassVar[list[t.Row]] = ROWS

    @pytest.fixture
    def contribution(self) -> Contribution:
        plugin = build_index().plugins.get(normalise(self.distribution))
        assert plugin is not None, f"{self.distribution} is not installed: pip install -e ."
        assert plugin.status == READY, f"{plugin.name} is {plugin.status}: {plugin.reason}"
        found = [entry for entry in plugin.entries if (entry.kind, entry.id) == (self.kind, self.id)]
        assert found, f"the manifest of {plugin.name} has no [[{self.kind}]] {self.id!r}"
        return Contribution(found[0], plugin)

    @pytest.fixture
    def config(self, contribution: Contribution) -> Any:
        return load_options(contribution, dict(self.options))

    @pytest.fixture
    def activator(self, contribution: Contribution) -> Activator:
        (activator := Activator()).activate([contribution])  # refuses a hook that it does not know
        return activator

    @pytest.fixture
    def bundle(self, tiny_bundle: t.ModelBundle) -> t.ModelBundle:
        """A fresh tiny model with its template, by swift-plugin-transformers. Override it for another family."""
        return tiny_bundle

    @pytest.fixture
    def samples(self, bundle: t.ModelBundle) -> list[t.Sample]:
        return [sample for row in self.rows for sample in bundle.template.encode(row)]  # type: ignore[union-attr]

    @pytest.fixture
    def batch(self, bundle: t.ModelBundle, samples: list[t.Sample]) -> t.Batch:
        return bundle.template.collate(samples)  # type: ignore[union-attr]

    def test_imports_nothing_heavy(self, contribution: Contribution) -> None:
        assert not (fault := static.imports_nothing_heavy(contribution)), fault

    def test_options_have_help(self, contribution: Contribution) -> None:
        assert not (fault := static.options_have_help(contribution)), fault

    def test_hooks_are_marked(self, contribution: Contribution) -> None:
        assert not (fault := static.hooks_are_marked(contribution)), fault

    def test_no_overrides(self) -> None:
        contract = next(cls for cls in type(self).__mro__ if cls.__module__ == __name__)
        for name in (name for name in dir(contract) if name.startswith("test_")):
            own = getattr(type(self), name)
            excused = any(mark.name == "xfail" and mark.kwargs.get("reason") for mark in getattr(own, "pytestmark", ()))
            assert excused or own is getattr(contract, name), f"{name} is overridden without xfail(reason=...)"


class HookContract(Contract):
    """A kind whose hook returns one object for an id."""

    hook: ClassVar[str] = ""
    protocol: ClassVar[type] = object

    @pytest.fixture
    def arguments(self, config: Any) -> dict[str, Any]:
        """The hook's arguments, the id aside."""
        return {"config": config}

    @pytest.fixture
    def made(self, activator: Activator, contribution: Contribution, arguments: dict[str, Any]) -> Any:
        """What the hook returns for `id`, checked against its Protocol."""
        return activator.call(contribution, self.hook, self.protocol, **self.name(self.id), **arguments)

    def name(self, ident: str) -> dict[str, str]:
        return {f"{KINDS[self.kind]}_id": ident}

    def test_answers_its_id_only(self, activator: Activator, arguments: dict[str, Any], made: Any) -> None:
        assert made is not None
        assert getattr(activator.manager.hook, self.hook)(**self.name("no-such-id"), **arguments) is None


class ModelContract(HookContract):
    """A family. Where it sets `loads` or `generic`, its loader is tried on the folder `source`."""

    kind, hook, protocol = "models", "swift_load_model", t.ModelBundle

    @pytest.fixture
    def source(self, tiny_folder: Path) -> str:
        return str(tiny_folder)

    @pytest.fixture
    def arguments(self, request: pytest.FixtureRequest, activator: Activator, contribution: Contribution, config: Any) -> Any:
        if not (contribution.entry.options.get("loads") or contribution.entry.options.get("generic")):
            pytest.skip("this family loads through the generic loader")
        given = {"source": request.getfixturevalue("source"), "config": config}
        weight = next(request.getfixturevalue("bundle").model.parameters())
        placed = {"dtype": weight.dtype, "device": weight.device}
        processor = activator.call(contribution, "swift_load_processor", object, **self.name(self.id), **given)
        backend = SimpleNamespace(rank=0, world=1, device=weight.device, load_kwargs=lambda: placed)
        return {**given, "processor": processor, "backend": backend, "load_kwargs": placed}

    def test_is_described(self, contribution: Contribution) -> None:
        assert {"architectures", "generic", "source"} & set(contribution.entry.options)
        ids = [row["id"] for row in Registry(build_index()).checkpoints(contribution)]
        assert len(ids) == len(set(ids))

    def test_loads_in_eval_mode(self, made: t.ModelBundle, batch: t.Batch, arguments: dict[str, Any]) -> None:
        assert (made.source, made.model.training) == (arguments["source"], False)
        assert isfinite(float(logits(made.model, batch).abs().max()))


class TemplateContract(HookContract):
    kind, hook, protocol = "templates", "swift_make_template", t.Template
    trains_prompt: ClassVar[bool] = False  # a template for pre-training trains every token

    @pytest.fixture
    def arguments(self, bundle: t.ModelBundle, config: Any) -> dict[str, Any]:
        return {"processor": bundle.processor, "config": config}

    def test_trains_exactly_the_answer(self, made: t.Template) -> None:
        for row in self.rows:
            sample, prompt = made.encode(row)[0], made.prompt(row["messages"][:-1])
            trained = [token for token, weight in zip(sample.input_ids, sample.weights, strict=True) if weight]
            assert row["messages"][-1]["content"] in made.decode(trained)
            if "prompt-mismatch" not in sample.notes:
                assert sample.input_ids[: len(prompt)] == prompt
                assert self.trains_prompt or not any(sample.weights[: len(prompt)])

    def test_collates_and_packs(self, made: t.Template) -> None:
        samples = [sample for row in self.rows for sample in made.encode(row)]
        batch, lengths, packed = made.collate(samples), [len(sample.input_ids) for sample in samples], made.pack(samples)
        assert batch.inputs["input_ids"].shape[0] == len(samples)
        assert batch.inputs["input_ids"].shape[1] >= max(lengths)
        assert batch.weights.shape == batch.labels.shape
        weights = [weight for sample in samples for weight in sample.weights[1:]]  # nothing predicts a first token
        assert (batch.tokens, batch.trained_tokens) == (sum(lengths), sum(map(bool, weights)))
        assert batch.weight == pytest.approx(sum(weights)) == pytest.approx(float(batch.weights.sum()))
        assert packed is None or packed.segments == lengths


class TunerContract(HookContract):
    kind, hook, protocol = "tuners", "swift_apply_tuner", t.TunedModel

    @pytest.fixture
    def arguments(self, bundle: t.ModelBundle, config: Any) -> dict[str, Any]:
        return {"bundle": bundle, "config": config}

    @pytest.fixture
    def tune(self, activator: Activator, contribution: Contribution, bundle: t.ModelBundle, config: Any) -> Any:
        """A function that tunes a fresh copy of the model, and moves what is trained away from its start."""

        def tune(moved: bool = True) -> Any:
            given = {"bundle": dataclasses.replace(bundle, model=copy.deepcopy(bundle.model)), "config": config}
            tuned = activator.call(contribution, self.hook, self.protocol, **self.name(self.id), **given)
            for weight in tuned.trainable().values() if moved else ():
                weight.data.add_(weight.data.clone().normal_(0.0, 0.02))
            return tuned

        return tune

    def test_gradient_reaches_all_that_is_trained(self, tune: Callable[..., t.TunedModel], batch: t.Batch) -> None:
        tuned = tune()
        tuned.before_step(1)
        weights = tuned.trainable()
        assert weights
        assert {id(weight) for weight in weights.values()} == {id(w) for w in tuned.model.parameters() if w.requires_grad}
        sum_loss(tuned.model.eval()(**batch.inputs), batch).backward()
        assert [name for name, weight in weights.items() if weight.grad is None or not weight.grad.abs().sum() > 0] == []
        groups = tuned.param_groups(SimpleNamespace(learning_rate=1e-3, weight_decay=0.0))
        assert {id(w) for group in groups for w in group["params"]} == {id(weight) for weight in weights.values()}

    def test_saves_and_loads(self, tune: Callable[..., t.TunedModel], batch: t.Batch, tmp_path: Path) -> None:
        tuned, fresh = tune(), tune(moved=False)
        expected = logits(tuned.model, batch)
        assert gap(logits(fresh.model, batch), expected) > 0
        tuned.save(tmp_path)
        assert not {file.suffix for file in tmp_path.rglob("*")} & {".bin", ".pt", ".pth", ".pkl"}
        fresh.load(tmp_path)
        assert gap(logits(fresh.model, batch), expected) == 0

    def test_disabled_is_the_base(self, tune: Callable[..., t.TunedModel], bundle: t.ModelBundle, batch: t.Batch) -> None:
        base, tuned = logits(bundle.model, batch), tune()
        expected = logits(tuned.model, batch)
        try:
            with tuned.disabled():
                assert gap(logits(tuned.model, batch), base) <= 1e-6
        except CapabilityError as err:
            pytest.skip(str(err))
        assert gap(logits(tuned.model, batch), expected) == 0

    def test_merged_equals_unmerged(self, tune: Callable[..., t.TunedModel], batch: t.Batch) -> None:
        tuned = tune()
        expected = logits(tuned.model, batch)
        assert gap(logits(tuned.merge().model, batch), expected) <= 1e-4


class TrainerContract(HookContract):
    """A loop, run on the tiny model. Set `settings` for another tuner or further roles; override `samples` for other data."""

    kind, hook, protocol = "trainers", "swift_make_trainer", t.Trainer
    settings: ClassVar[dict[str, Any]] = {"tuner": "full", "backend": {"name": "torch", "device": "cpu"}}

    @pytest.fixture
    def run(self, config: Any, tiny_folder: Path, samples: list[t.Sample], tmp_path: Path) -> Any:
        with Session(parse_config({"model": str(tiny_folder), **self.settings})) as session:
            processor = session.processor(session.model_ref)
            template, data = session.template(session.model_ref, processor), t.Data(SampleList(samples), SampleList(), {})
            given = (session.config, config, Plan(), processor, template, data, session.backend, session.events, session)
            yield t.Run(*given, tmp_path, resume_from=None, warm_start=None, part=session.part, engine=session.policy_engine)

    @pytest.fixture
    def arguments(self, run: t.Run) -> dict[str, Any]:
        return {"run": run}

    def test_fits_and_reports(self, made: t.Trainer, run: t.Run) -> None:
        steps: list[dict[str, Any]] = []
        run.events.add(lambda event: steps.append(event.data) if event.kind == "step" else None)
        metrics = made.fit().metrics
        assert isfinite(metrics["train_loss"])
        assert set(metrics) >= SUMMARY
        assert steps
        assert all(isfinite(data["loss"]) and set(data) >= set(STEP) for data in steps)


class BackendContract(HookContract):
    kind, hook, protocol = "backends", "swift_open_backend", t.Backend
    trainer: ClassVar[Any] = SimpleNamespace(learning_rate=1e-2, weight_decay=0.0, betas=[0.9, 0.999])  # given to `prepare`

    def test_launches_without_torch(self, contribution: Contribution, config: Any, tmp_path: Path) -> None:
        run_walled(LAUNCHER.format(self.id, self.options))
        asked = {"backend_id": self.id, "config": config}
        launcher, ran = Activator().call(contribution, "swift_make_launcher", t.Launcher, **asked), []
        if launcher.processes == 1:
            launcher.launch(t.Job(tmp_path, [], lambda: ran.append(1)))
            assert ran == [1]

    def test_trains(self, made: t.Backend, bundle: t.ModelBundle, batch: t.Batch) -> None:
        policy = Session(RunConfig()).tuned(bundle, Component("full"))
        steps, losses = made.prepare({"policy": policy}, None, self.trainer), []
        assert isinstance(steps, t.Steps)
        for _ in range(3):
            losses.append(steps.forward_backward([batch, batch], sum_loss).loss)
            assert steps.optimizer_step(1e-2, 1.0) > 0
        assert losses[0] > losses[1] > losses[2]
        assert steps.evaluate([batch], sum_loss).loss < losses[2]
        assert (0 <= made.rank < made.world, made.all_true(True), made.all_true(False)) == (True, True, False)
        assert json.dumps([made.describe(), made.peak_bytes()])
        made.close()


CAPABILITIES = {
    "stream", "concurrent", "constraint", "adapters", "embed", "score", "sync", "sleep", "media", "predict"
}  # fmt: skip


class EngineContract(HookContract):
    kind, hook, protocol = "engines", "swift_make_engine", t.Engine

    @pytest.fixture
    def source(self, request: pytest.FixtureRequest, contribution: Contribution) -> Any:
        takes = contribution.entry.options.get("takes", "bundle")
        if takes == "url":
            raise RequestError("this engine takes a URL: override the fixture `source`")
        bundle = request.getfixturevalue("bundle")
        return bundle if takes == "bundle" else t.ModelFolder(bundle.source, bundle.processor, bundle.template)

    @pytest.fixture
    def arguments(self, source: Any, config: Any) -> dict[str, Any]:
        return {"source": source, "config": config}

    def test_generates(self, made: t.Engine) -> None:
        requests = [t.Request(row["messages"][:-1], max_tokens=8) for row in self.rows]
        first, again = ({done.index: done for done in made.generate(requests) if done.finish} for _ in range(2))
        assert first == again
        assert sorted(first) == list(range(len(requests)))
        assert {done.finish for done in first.values()} <= {"stop", "length"}
        assert all(len(done.logprobs) == len(done.token_ids) <= 8 for done in first.values())
        if "stream" in made.capabilities:
            streamed = {done.index: done.text for done in made.generate(requests, stream=True) if done.finish}
            assert streamed == {index: done.text for index, done in first.items()}

    def test_scores_tokens(self, made: t.Engine) -> None:
        found = made.logprobs([[5, 6, 7], [8, 9]])
        assert [len(values) for values in found] == [2, 1]
        assert all(value <= 0 for values in found for value in values)
        assert made.capabilities <= CAPABILITIES
        made.close()


class QuantizerContract(HookContract):
    kind, hook, protocol = "quantizers", "swift_make_quantizer", t.Quantizer

    def test_quantizes_and_saves(
        self, made: t.Quantizer, bundle: t.ModelBundle, batch: t.Batch, samples: list[t.Sample], tmp_path: Path
    ) -> None:
        full, quantized = logits(bundle.model, batch), made.apply(bundle, bundle.source, samples)
        assert quantized.quantization == self.id
        assert 0 < gap(logits(quantized.model, batch), full) < float("inf")
        made.save(quantized, tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == self.id
        assert {file.suffix for file in tmp_path.rglob("*.*")} <= {".safetensors", ".json", ".jinja", ".txt", ".model"}


class EvaluatorContract(HookContract):
    kind, hook, protocol = "evaluators", "swift_make_evaluator", t.Evaluator

    @pytest.fixture
    def run(self) -> t.EvalRun:
        """`rows`, and an engine that answers each with the first one's answer."""

        def generate(requests: list[t.Request], stream: bool = False) -> Any:
            return (t.Completion(n, self.rows[0]["messages"][-1]["content"], [1], [-1.0], "stop") for n in range(len(requests)))

        def logprobs(sequences: list[list[int]], adapter: str | None = None) -> list[list[float]]:
            return [[-1.0] * (len(ids) - 1) for ids in sequences]

        engine: Any = SimpleNamespace(capabilities=frozenset(), generate=generate, logprobs=logprobs)

        def encode(row: t.Row) -> list[t.Sample]:
            ids = list(str(row["messages"]).encode())
            return [t.Sample(ids, [0.0] + [1.0] * (len(ids) - 1))]

        template: Any = SimpleNamespace(encode=encode, prompt=lambda messages, tools=None, **_: list(str(messages).encode()))
        records = [t.Record(row, f"row {n}") for n, row in enumerate(self.rows)]
        return t.EvalRun(engine, records, template, EventSink(), lambda kind, ident: lambda got, want: float(got == want))

    def test_reports(self, made: t.Evaluator, run: t.EvalRun) -> None:
        report = made.evaluate(run)
        assert report.metrics
        assert all(map(isfinite, report.metrics.values()))
        assert json.dumps([report.rows, report.counts])


class DatasetContract(HookContract):
    kind, hook, protocol = "datasets", "swift_open_dataset", t.Dataset

    def test_gives_the_same_standard_rows_twice(self, made: t.Dataset) -> None:
        records = list(made)
        assert records
        assert records == list(made)
        for record in records:
            roles = {message["role"] for message in record.row.get("messages", ())}
            assert record.where
            assert record.refused or (roles and roles <= {"system", "user", "assistant", "tool"})
        if isinstance(made, t.RawDataset):
            assert [made.record(raw) for raw in pickle.loads(pickle.dumps(list(made.raw())))] == records
            assert made.fingerprint() == made.fingerprint()


class PartContract(HookContract):
    """A part; `id` reads kind/name, such as `metric/rouge`."""

    kind, hook = "parts", "swift_make_part"

    @pytest.fixture
    def arguments(self, config: Any) -> dict[str, Any]:
        return {"kind": self.id.partition("/")[0], "run": None, "config": config}

    def name(self, ident: str) -> dict[str, str]:
        return {"part_id": ident.rpartition("/")[2]}

    def test_keeps_to_its_protocol(self, made: Any) -> None:
        protocol: Any = t.PART_PROTOCOLS.get(self.id.partition("/")[0], object)
        assert isinstance(made, protocol)
        if self.id.startswith("metric/"):
            assert 0 <= made("no", "a test") <= made("a test", "a test") <= 1


class CallbackContract(Contract):
    kind = "callbacks"

    def test_follows_a_run_that_names_it(self, activator: Activator, contribution: Contribution, tmp_path: Path) -> None:
        def make(named: list[Component]) -> list[t.Callback]:
            run = SimpleNamespace(config=RunConfig(callbacks=named), output=tmp_path, stop=None, events=EventSink())
            return activator.call_each([contribution], "swift_make_callbacks", run=run)

        assert make([]) == make([Component("no-such-id")]) == []
        made = make([Component(self.id, None, dict(self.options))])
        assert made
        for callback in made:
            assert isinstance(callback, t.Callback)
            for kind, data in EVENTS.items():
                callback.on_event(Event(kind, dict(data)))


class CommandContract(Contract):
    kind = "commands"

    def test_helps(self, contribution: Contribution) -> None:
        from click.testing import CliRunner

        result = CliRunner().invoke(load_object(contribution.entry.options["target"], contribution), ["--help"])
        assert (result.exit_code, result.output[:6]) == (0, "Usage:")
