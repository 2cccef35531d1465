"""A training run from its configuration to `summary.json`: prepare in the parent, launch the ranks, run one rank."""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from swift_core import types
from swift_core.config import RunConfig, load_config
from swift_core.errors import Interrupted, RequestError
from swift_core.events import EventSink, LogWriter, console_events, make_console
from swift_core.plan import Plan, write_json
from swift_core.report import write_report
from swift_core.rundir import Checkpoints, check_output, discard_output, open_output
from swift_core.session import Session

DECISIVE = re.compile(
    r"(model|models|template|tuner|quantizer|seed|freeze)(\.|$)|backend\.(name|provider|precision|processes)$|"
    r"trainer\.(?!(epochs|max_steps|eval_every|save_every|log_every|keep|patience|resume)$)"
)
"""Settings that change a run's numbers: they may not change between a run and its continuation."""


def train(config: RunConfig, overwrite: bool = False, dry_run: bool = False) -> dict[str, Any]:
    """Run a training job to its end and return its summary. Raises RequestError, RunError, Interrupted."""
    events = console_events(config.strict)
    _inherit(config)
    with Session(config, events) as session:
        plan = session.resolve_all()
        _complete(config, session, plan)
        output = Path(config.output or "")
        resume = _find_resume(plan, session, output)
        if resume and (other := Plan.load(resume).differences(session.registry.index)):
            events.warn(f"{resume} was made with other versions, so its numbers may go on otherwise: {', '.join(other)}")
        resuming = bool(getattr(session.trainer.options, "resume", False))
        check_output(output, resuming, overwrite)
        # Before the data: what a launcher refuses need not wait for it.
        launcher = session.call(session.choose("backends", config.backend), "swift_make_launcher", types.Launcher)
        data, account = session.prepare(session.training_template())
        plan.data = session.preparer.fingerprint(data)
        if resume and Plan.load(resume).data != plan.data:
            raise RequestError(
                f"trainer.resume: {resume} was made with other data: the samples are not the same now. Set dataset, "
                f"eval_dataset and holdout back, or begin a new run from its weights: --from {resume} --output NEW"
            )
        _tell_data(events, data, account)
        if dry_run:
            return {"dry_run": True, "config": config.dump(), "data": data.account}
        open_output(output, resuming, overwrite)
        _write_inputs(output, config, plan)
        session.preparer.hand_over(data, output / "data")
        if launcher.processes == 1:
            session.preparer.follow(data, output / "data")
        started = time.time()
        argv = [sys.executable, "-m", "swift_core.rank", str(output)]
        try:
            launcher.launch(types.Job(output, argv, partial(run_rank, session, plan, data, output)))
        except RequestError:
            discard_output(output)
            raise
        summary = _finish(output, started)
        events.emit("done", summary=summary)
        return summary


def run_rank(session: Session, plan: Plan, data: types.Data, output: Path) -> None:
    """The run inside one rank: model, trainer, callbacks. Rank 0 logs, and writes `summary.json`."""
    config, events, backend = session.config, session.events, session.backend
    backend.seed(config.seed)
    main = backend.rank == 0
    log = LogWriter(output / "log.jsonl") if main else None
    if log:
        events.add(log)
    try:
        resume = _find_resume(plan, session, output)
        warm = Path(config.warm_start) if config.warm_start and not resume else None
        run = types.Run(
            config, session.trainer.options, plan, session.processor(session.model_ref),
            session.template(session.model_ref, session.processor(session.model_ref), plan.components["template"]["name"]),
            data, backend, events, session, output, resume, warm, session.part, session.policy_engine,
        )  # fmt: skip
        run.part = partial(session.part, run=run)
        if main:
            for callback in session.callbacks(run):
                events.add_callback(callback)
        events.emit("run", plan=plan.components, backend=backend.describe(), data=data.account, resumed=str(resume or ""))
        trainer = session.call(session.trainer, "swift_make_trainer", types.Trainer, run=run)
        with _stop_on_signal(run):
            result = trainer.fit()
        summary = {**result.metrics, "last": str(result.last or ""), "best": str(result.best or ""), "stopped": result.stopped}
        summary["output"] = str(output)
        if main:
            write_json(output / "summary.json", summary)
            events.emit("summary", **summary)
            write_report(output)
        if result.stopped == "interrupted":
            command = f"swift-core train {output / 'config.yaml'} trainer.resume=true"
            raise Interrupted(f"stopped at step {result.metrics.get('steps')}; saved {result.last}. Continue: {command}")
    finally:
        if log:
            events.remove(log)
            log.close()


def rank_main(folder: Path) -> None:
    """A rank of a multi-process run: activate from the plan, read the prepared data, run."""
    config = load_config([folder / "config.yaml"], [])
    plan = Plan.load(folder)
    events = EventSink(config.strict)
    with Session(config, events) as session:
        different = plan.differences(session.registry.index)
        if different:
            raise RequestError(f"rank: other versions than the plan's are installed: {', '.join(different)}")
        session.resolve_all()
        data = session.preparer.receive(
            session, session.training_template(), folder / "data"
        )  # the backend may start a process group
        if session.backend.rank == 0:
            events.add(make_console())
            session.preparer.follow(data, folder / "data")
        run_rank(session, plan, data, folder)


@contextmanager
def _stop_on_signal(run: types.Run) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM ends the run after its step, with a checkpoint; the second at once."""

    def ask(number: int, frame: object) -> None:
        if run.stop:
            raise KeyboardInterrupt
        run.stop = "interrupted"
        run.events.note("stopping after this step; once more stops at once, without saving")

    try:
        previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: the caller handles signals
        yield
        return
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _inherit(config: RunConfig) -> None:
    """`--from RUN` without a model of its own means the model that was trained there."""
    if not config.warm_start:
        return
    path = Path(config.warm_start)
    if not path.is_dir():
        raise RequestError(f"from: {path}: no such folder")
    if (path / "checkpoints").is_dir():
        path = Checkpoints(path).last_of_run()
    if not any((path / name).is_file() for name in ("plan.json", "adapter_config.json")):
        raise RequestError(f"from: {path} is neither a run nor a checkpoint; give a model's folder with --model")
    config.warm_start = str(path.resolve())
    if config.model.name is None:
        config.model = replace(Plan.load(path).component("model"), provider=None)


def _complete(config: RunConfig, session: Session, plan: Plan) -> None:
    """Fill the configuration with every default, so that config.yaml says all."""
    config.output = config.output or f"runs/{session.trainer.id}-{time.strftime('%Y%m%d-%H%M%S')}"
    for kind, part in plan.components.items():
        setattr(config, kind, replace(getattr(config, kind), name=part["name"], options=part["options"]))
    for component in (*config.dataset, *config.eval_dataset):
        if component.name and Path(component.name.partition("#")[0]).exists():
            component.name = str(Path(component.name).resolve())
    plan.config = config.dump()


def _find_resume(plan: Plan, session: Session, output: Path) -> Path | None:
    """The checkpoint that `trainer.resume` names: true is the output folder's last one."""
    wanted = getattr(session.trainer.options, "resume", False)
    if not wanted:
        return None
    if wanted is not True:
        path = Path(str(wanted))
        if not (path / "plan.json").is_file():
            raise RequestError(f"trainer.resume: {path} is not a checkpoint")
    else:
        found = Checkpoints(output).last()
        if found is None:
            return None  # killed before its first checkpoint: begin again, with the same numbers
        path = found
    before, now = Plan.load(path).settings(), plan.settings()
    addresses = [key for key in dict.fromkeys([*now, *before]) if DECISIVE.match(key) and now.get(key) != before.get(key)]
    if addresses:
        changes = [f"{key.removesuffix('.name')} was {before.get(key)} and is {now.get(key)}" for key in addresses]
        raise RequestError(
            f"trainer.resume: {path} was made with other settings: {'; '.join(changes)}. "
            f"Set them back, or begin a new run from its weights: --from {path} --output NEW"
        )
    return path


def _write_inputs(output: Path, config: RunConfig, plan: Plan) -> None:
    import yaml

    plan.save(output)
    text = yaml.safe_dump(config.dump(), sort_keys=False, allow_unicode=True)
    (output / "config.yaml").write_text(text, encoding="utf-8")


def _tell_data(events: EventSink, data: types.Data, account: Any) -> None:
    held = f"{len(data.eval)} samples to evaluate on"
    if isinstance(data.train, types.Stream):
        events.note(f"data: a stream, {data.account['window']} rows a window" + (f"; {held}" if data.eval else ""))
        return
    events.note(
        f"data: {account.rows} rows, {len(data.train)} samples, {account.tokens} tokens, {account.trained_tokens} trained"
        + (f"; {held}" if data.eval else "")
    )
    for what, count in account.reasons.items():
        lost = account.lost_tokens[what]
        events.warn(f"{count} rows {what}" + (f", {lost} tokens lost" if lost else "") + " (listed in data/issues.jsonl)")
    for note, count in account.notes.items():
        events.note(f"{count} samples: {note}")


def _finish(output: Path, started: float) -> dict[str, Any]:
    import json

    summary: dict[str, Any] = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    summary["wall_seconds"] = round(time.time() - started, 2)
    counts = output / "data" / "account.json"
    if counts.is_file():  # of a stream: what was read of it
        summary["data"] = json.loads(counts.read_text(encoding="utf-8"))
    write_json(output / "summary.json", summary)
    return summary
