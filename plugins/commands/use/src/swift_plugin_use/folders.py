"""Writes merged and quantized models as folders that load like any other, and compares what was written with what was."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from swift_core import types
from swift_core.config import Component, RunConfig
from swift_core.errors import RequestError
from swift_core.events import EventSink
from swift_core.models import resolve_model
from swift_core.rundir import put_in_place
from swift_core.session import Session

PROBES = (
    "Who are you?", "What is the capital of France?", "Write a short poem about the sea.",
    "Explain why the sky is blue.", "List three uses of a paper clip.", "What is 12 times 7?",
)  # fmt: skip


def export(config: RunConfig, output: Path, overwrite: bool, events: EventSink) -> dict[str, Any]:
    """Merge what was trained into the base model's weights, write the folder, load it again and measure the gap.

    Raises RequestError when there is nothing to merge.
    """
    with Session(config, events) as session:
        ref = session.model_ref
        if ref.adapter is None:
            raise RequestError(f"model {ref.name} has no adapter to merge: give a run, a checkpoint or an adapter's folder")
        if session.quantizer(ref) is not None:
            raise RequestError(f"model {ref.name} was trained on quantized weights: serve it as it is, base and adapter apart")
        tuned = session.checkpoint(ref)
        assert tuned is not None
        bundle = session.tuned_bundle(tuned, ref)
        assert bundle.template is not None
        sequences = probe_sequences(bundle.template)
        engine = session.open_engine(session.choose("engines", config.engine), bundle)
        before = said(engine, sequences)
        merged = tuned.merge()
        written = write_folder(output, overwrite, lambda folder: _save_plain(merged, folder))
        gap = _gap_to(written, config, session, sequences, before)
    events.note(f"merged model: {written}; largest log-probability gap to the adapter: {gap:.2e}")
    return {"output": str(written), "gap": gap}


def quantize(config: RunConfig, output: Path, overwrite: bool, events: EventSink) -> dict[str, Any]:
    """Quantize a folder into a folder, load it again, and measure the gap to the original."""
    if not config.quantizer.name:
        raise RequestError("quantizer is missing: --quantizer NAME, see swift-core quantizers list")
    quantizer, config.quantizer = config.quantizer, Component()
    with Session(config, events) as session:
        ref = session.model_ref
        if ref.adapter:
            raise RequestError(f"model {ref.name} has an adapter: merge it first with swift-core export")
        if ref.quantization:
            raise RequestError(f"model {ref.name} is quantized by {ref.quantization} already")
        sequences = probe_sequences(session.template(ref, session.processor(ref)))
        engine = session.engine(ref)
        before = said(engine, sequences)
        engine.close()  # three copies of a model at once would be one too many
        config.quantizer = quantizer
        method = session.quantizer(ref)
        assert method is not None
        bundle = session.bundle(ref, method)
        written = write_folder(output, overwrite, lambda folder: method.save(bundle, folder))
        config.quantizer = Component()
        gap = _gap_to(written, config, session, sequences, before)
    sizes = [sum(file.stat().st_size for file in Path(path).rglob("*.safetensors")) for path in (ref.source, written)]
    events.note(
        f"quantized model: {written}, {sizes[0] / 2**20:.0f} MiB to {sizes[1] / 2**20:.0f} MiB; "
        f"largest log-probability gap to the original: {gap:.3g}"
    )
    return {"output": str(written), "gap": gap, "bytes_before": sizes[0], "bytes_after": sizes[1]}


def write_folder(output: Path, overwrite: bool, write: Callable[[Path], None]) -> Path:
    """Write a model folder whole or not at all. Raises RequestError when it exists and may not be replaced."""
    used = output.is_file() or (output.is_dir() and any(output.iterdir()))
    if used and not (overwrite and (output / "config.json").is_file()):
        raise RequestError(f"output {output} exists and is not empty; choose another, or replace a model with --overwrite")
    pending = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(pending, ignore_errors=True)
    pending.mkdir(parents=True)
    try:
        write(pending)
        put_in_place(pending, output)
    except BaseException:
        shutil.rmtree(pending, ignore_errors=True)
        raise
    return output


def _gap_to(folder: Path, config: RunConfig, session: Session, sequences: list[list[int]], before: list[list[float]]) -> float:
    ref = resolve_model(session.registry, Component(str(folder), options=config.model.options))
    return largest_gap(before, said(session.engine(ref), sequences))


def _save_plain(bundle: types.ModelBundle, folder: Path) -> None:
    bundle.model.save_pretrained(folder)
    bundle.processor.save_pretrained(folder)


def probe_sequences(template: types.Template) -> list[list[int]]:
    """Token ids to compare models on: a few questions, rendered for the model."""
    return [template.prompt([{"role": "user", "content": text}]) for text in PROBES]


def said(engine: Any, sequences: list[list[int]]) -> list[list[float]]:
    """What a model says of token ids: log-probabilities, or the numbers of its head."""
    heads = "predict" in getattr(engine, "capabilities", ())
    found: list[list[float]] = engine.outputs(sequences) if heads else engine.logprobs(sequences)
    return found


def largest_gap(one: list[list[float]], other: list[list[float]]) -> float:
    """The largest difference of two models' log-probabilities of the same tokens."""
    return max(abs(a - b) for row, same in zip(one, other, strict=True) for a, b in zip(row, same, strict=True))
