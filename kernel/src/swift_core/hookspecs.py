"""The hooks that a plugin may implement. Each is called only for ids that the plugin's manifest claims.

All but `swift_make_callbacks` are `firstresult`: return None unless the id is yours. A wrapper (`wrapper=True`) must pass
None through. Whatever a hook raises reaches the user as `PluginError(plugin, hook)` with the cause; raise
`swift_core.errors.RequestError` for a fault of the user's, which is shown as it is. Results are checked against their
Protocol in `swift_core.types`. Heavy libraries are imported inside a hook, never at the top of its module.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from swift_core import types

hookspec = pluggy.HookspecMarker("swift")


class SwiftSpecs:
    """One method a hook. pluggy checks argument names when a plugin is registered."""

    @hookspec(firstresult=True)
    def swift_open_dataset(self, dataset_id: str, config: Any) -> types.Dataset | None:
        """Open a source of rows. Called in the parent process, before any rank starts.

        dataset_id: an id of your manifest's `[[datasets]]`; for the generic one, any file, folder or hub id comes in
            through `config.path`.
        config: your dataclass, filled from `dataset: {name: ..., KEY: VALUE}`.
        Returns a `Dataset`: records in the standard form, in the same order each time it is iterated.
        Raises RequestError when the source cannot be read. A single bad row is a `Record` with `refused`, never an error.

            @hookimpl
            def swift_open_dataset(dataset_id, config):
                if dataset_id == "poems":
                    from .poems import Poems
                    return Poems(config.language)
        """

    @hookspec(firstresult=True)
    def swift_load_processor(self, model_id: str, source: str, config: Any) -> types.Processor | None:
        """Load a tokenizer or processor: no weights, no device. Called before the model, and alone for `inspect`.

        model_id: the loader's id: your family where it sets `loads = true`, else the generic one's.
        source: a local folder or a hub id.
        config: the model dataclass of the loader; `config.trust_remote_code` is the run's.

            @hookimpl
            def swift_load_processor(model_id, source, config):
                if model_id == "mymodel":
                    from transformers import AutoTokenizer
                    return AutoTokenizer.from_pretrained(source)
        """

    @hookspec(firstresult=True)
    def swift_load_model(
        self,
        model_id: str,
        source: str,
        processor: types.Processor,
        backend: types.Backend,
        load_kwargs: dict[str, Any],
        config: Any,
    ) -> types.ModelBundle | None:
        """Load the weights. Called in each rank, after the processor and the backend.

        load_kwargs: the backend's (`dtype`, `device`) and the quantizer's. `skeleton=True` asks for a model on the meta
            device, without weights, which the quantizer then fills.
        Returns a `ModelBundle` whose model is in eval mode. Raises RequestError for missing or truncated files.

            @hookimpl
            def swift_load_model(model_id, source, processor, backend, load_kwargs, config):
                if model_id == "mymodel":
                    model = MyModel.from_pretrained(source, dtype=load_kwargs["dtype"]).to(load_kwargs["device"])
                    return ModelBundle(model, processor, source, "MyModelForCausalLM")
        """

    @hookspec(firstresult=True)
    def swift_make_template(self, template_id: str, processor: types.Processor, config: Any) -> types.Template | None:
        """Make what turns rows into tokens for one checkpoint.

        template_id: an id of your `[[templates]]`; `checkpoint` is the checkpoint's own chat template.
        processor: what `swift_load_processor` returned.
        Returns a `Template`. Raises RequestError when the processor cannot serve it.

            @hookimpl
            def swift_make_template(template_id, processor, config):
                if template_id == "mychat":
                    return MyChat(processor, config)
        """

    @hookspec(firstresult=True)
    def swift_apply_tuner(self, tuner_id: str, bundle: types.ModelBundle, config: Any) -> types.TunedModel | None:
        """Choose or add what is trained. Called after loading and quantization, before the backend places the model.

        bundle: the loaded model; it may be changed in place. Parameters that are not to be trained must have
            `requires_grad` False when this returns.
        Returns a `TunedModel`. Raises RequestError when the config matches nothing in this model.

            @hookimpl
            def swift_apply_tuner(tuner_id, bundle, config):
                if tuner_id == "bias":
                    from .bias import BiasOnly
                    return BiasOnly(bundle, config)
        """

    @hookspec(firstresult=True)
    def swift_make_trainer(self, trainer_id: str, run: types.Run) -> types.Trainer | None:
        """Make the training loop. Called in each rank, with the data prepared and the backend open.

        run: everything the loop needs; its options are `run.trainer_config`, your dataclass. Models load on first
            `run.models.get(role)`. Gradients go through `run.backend.prepare(...)`, never `loss.backward()`.
        Returns a `Trainer`; its `fit()` runs to the end and returns a `TrainResult`.

            @hookimpl
            def swift_make_trainer(trainer_id, run):
                if trainer_id == "mysft":
                    from .loop import MyLoop
                    return MyLoop(run)
        """

    @hookspec(firstresult=True)
    def swift_make_launcher(self, backend_id: str, config: Any) -> types.Launcher | None:
        """Make what starts the ranks. Called in the parent; must not import torch.

        config: your backend's dataclass; `config.processes` is how many ranks are asked for.
        Returns a `Launcher`; with one process it runs the job in this one.

            @hookimpl
            def swift_make_launcher(backend_id, config):
                if backend_id == "mybackend":
                    return MyLauncher(config.processes)
        """

    @hookspec(firstresult=True)
    def swift_open_backend(self, backend_id: str, config: Any) -> types.Backend | None:
        """Open devices and the process group, inside a rank. Closed by the session.

        Returns a `Backend`. Raises RequestError for a device or a precision that this machine does not have.

            @hookimpl
            def swift_open_backend(backend_id, config):
                if backend_id == "mybackend":
                    return MyBackend(config.device, config.precision)
        """

    @hookspec(firstresult=True)
    def swift_make_engine(
        self, engine_id: str, source: types.ModelBundle | types.ModelFolder | str, config: Any
    ) -> types.Engine | None:
        """Make what runs a model forward, for infer, chat, eval and generation inside a run.

        source: a `ModelBundle` with its `template` set when your manifest says `takes = "bundle"` (the default), the
            `ModelFolder` of a checkpoint that is not loaded with `takes = "folder"`, or a URL with `takes = "url"`.
        Returns an `Engine`. Closed by the session.

            @hookimpl
            def swift_make_engine(engine_id, source, config):
                if engine_id == "myengine":
                    return MyEngine(source, config)
        """

    @hookspec(firstresult=True)
    def swift_make_quantizer(self, quantizer_id: str, config: Any) -> types.Quantizer | None:
        """Make a quantizer: used by `quantize`, by `train --quantizer`, and to load a folder that it wrote, which says
        `quant_method = <your id>` in its config.json.

            @hookimpl
            def swift_make_quantizer(quantizer_id, config):
                if quantizer_id == "myquant":
                    return MyQuantizer(config.bits)
        """

    @hookspec(firstresult=True)
    def swift_make_evaluator(self, evaluator_id: str, config: Any) -> types.Evaluator | None:
        """Make an evaluator for `eval`: it gets an engine and records, and returns an `EvalReport`.

        @hookimpl
        def swift_make_evaluator(evaluator_id, config):
            if evaluator_id == "mysuite":
                return MySuite(config.shots)
        """

    @hookspec(firstresult=True)
    def swift_make_part(self, kind: str, part_id: str, run: types.Run | None, config: Any) -> object | None:
        """Make a small part that another plugin asks for by name.

        kind: preparer, rows, optimizer, loss, metric, reward, tool_format, environment, logger or hub.
        run: the training run, or None outside one (a metric of `eval`).
        Returns what the kind's Protocol in `swift_core.types.PART_PROTOCOLS` says.

            @hookimpl
            def swift_make_part(kind, part_id, run, config):
                if (kind, part_id) == ("metric", "same_length"):
                    return lambda prediction, reference: float(len(prediction) == len(reference))
        """

    @hookspec
    def swift_make_callbacks(self, run: types.Run) -> Iterable[types.Callback] | None:
        """Make callbacks for a run: each follows the event stream. Called in rank 0, for plugins that the run's
        `callbacks` name. The one hook that all of them answer.

        run: `run.config.callbacks` holds the components asked for; `run.stop = "reason"` ends the run cleanly.

            @hookimpl
            def swift_make_callbacks(run):
                yield Bell()
        """
