"""The loop against a plain torch loop written here, and what it saves, reports and stops at."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from swift_core.config import build_options, parse_config
from swift_core.errors import RequestError, RunError
from swift_core.plan import Plan
from swift_core.session import Session
from swift_core.source import SampleList
from swift_core.testing import TrainerContract
from swift_core.types import Batch, Data, Run, Sample, StepResult, TrainResult
from swift_plugin_supervised.config import PretrainConfig, SupervisedConfig
from swift_plugin_supervised.loop import SupervisedTrainer
from swift_plugin_torch.backend import TorchBackend
from transformers import AutoModelForCausalLM


class TestSft(TrainerContract):
    distribution, id, options = "swift-plugin-supervised", "sft", {"batch_size": 1, "epochs": 2}


class TestPt(TrainerContract):
    distribution, id, options = "swift-plugin-supervised", "pt", {"batch_size": 2, "packing": True}


def make_samples(count: int, seed: int) -> list[Sample]:
    """Samples of 6 to 30 tokens; a prompt of no weight, then weights of 0.5 and 1."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for row in range(count):
        length = int(torch.randint(6, 31, (1,), generator=generator))
        ids = torch.randint(3, 40, (length,), generator=generator).tolist()
        found.append(Sample(ids, [0.0] * 3 + [0.5] * 2 + [1.0] * (length - 5), row=row))
    return found


SAMPLES, HELD = make_samples(10, 1), make_samples(4, 2)
SEED = 42


class Fixture:
    """Runs of the loop on the tiny model, each in a session of its own."""

    def __init__(self, model: Path, output: Path) -> None:
        self.model, self.output = model, output
        self.steps: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.evals: list[float] = []
        self.weights: dict[str, torch.Tensor] = {}

    def fit(
        self, samples: list[Sample] | None = None, held: list[Sample] | None = None, folder: str = "run",
        prepare_run: Callable[[Run], Any] | None = None, kind: type = SupervisedConfig, tuner: str = "full", **options: Any,
    ) -> TrainResult:  # fmt: skip
        """Fit to the end. `prepare_run` may change the run before."""
        config = build_options(kind, options, "trainer.sft")
        tree = {"model": str(self.model), "tuner": tuner, "backend": {"name": "torch", "device": "cpu"}, "seed": SEED}
        with Session(parse_config(tree)) as session:
            processor = session.processor(session.model_ref)
            template = session.template(session.model_ref, processor)
            data = Data(SampleList(SAMPLES if samples is None else samples), SampleList(held or []), {})
            output = self.output / folder
            output.mkdir(exist_ok=True)
            given = (session.config, config, Plan(), processor, template, data, session.backend, session.events, session)
            run = Run(*given, output, resume_from=None, warm_start=None, part=session.part, engine=session.policy_engine)
            session.backend.seed(SEED)
            if prepare_run:
                prepare_run(run)
            self.steps, self.evals, self.notes = [], [], []
            session.events.add(self._listen)
            result = SupervisedTrainer(run).fit()
            model = run.models.get("policy").model
            self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
            return result

    def _listen(self, event: Any) -> None:
        if event.kind == "step":
            self.steps.append(event.data)
        elif event.kind == "eval":
            self.evals.append(event.data["loss"])
        elif event.kind == "note":
            self.notes.append(event.data["text"])

    @property
    def losses(self) -> list[float]:
        return [step["loss"] for step in self.steps]

    def folders(self, folder: str = "run") -> list[str]:
        """What stands in the run's checkpoints folder."""
        return sorted(path.name for path in (self.output / folder / "checkpoints").iterdir())


@pytest.fixture
def loop(tiny_folder: Path, tmp_path: Path) -> Fixture:
    return Fixture(tiny_folder, tmp_path)


def near(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float) -> bool:
    """All weights but one in a thousand: AdamW divides by the gradient's size, so where a gradient is next to zero its rounding
    decides. The gradients themselves are compared in `test_exactness.py` of the torch backend."""
    assert one.keys() == other.keys()
    gaps = torch.cat([(one[name] - other[name]).abs().flatten() for name in one])
    return float(gaps.max()) < 1e-3 and float((gaps > atol).float().mean()) < 1e-3


# --- against plain torch ----------------------------------------------------------------------------------------------


def loss_of(model: Any, samples: list[Sample]) -> tuple[torch.Tensor, float]:
    """The weighted sum of -log p, one unpadded sample at a time, and the sum of weights."""
    total, weight = torch.zeros(()), 0.0
    for sample in samples:
        ids = torch.tensor([sample.input_ids])
        scores = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(-1, ids[0, 1:, None])[:, 0]
        weights = torch.tensor(sample.weights[1:])
        total, weight = total - (scores * weights).sum(), weight + float(weights.sum())
    return total, weight


def plain_loop(
    folder: Path, order: list[list[int]], rates: list[float], clip: float, decay: float
) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses, gradient norms and final weights of a loop in plain torch; matrices decayed, vectors not."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=False)
    losses, norms = [], []
    for rows, rate in zip(order, rates, strict=True):
        optimizer.zero_grad()
        total, weight = loss_of(model, [SAMPLES[row] for row in rows])
        (total / weight).backward()
        losses.append(float(total.detach()) / weight)
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    return losses, norms, {name: p.detach() for name, p in model.named_parameters()}


OPTIONS = {
    "epochs": 2, "batch_size": 2, "accumulate": 2, "learning_rate": 3e-3, "warmup": 2.0, "schedule": "linear",
    "min_rate": 0.1, "clip": 0.5, "weight_decay": 0.1, "betas": [0.9, 0.99],
}  # fmt: skip
RATES = [3e-3 * part for part in (0.5, 1.0, 1.0, 0.775, 0.55, 0.325)]  # two steps up, then 1, 3/4, 1/2, 1/4 of the way to 0.1


@pytest.mark.parametrize("shuffle", [False, True])
def test_losses_and_weights_are_those_of_a_plain_loop(loop: Fixture, tiny_folder: Path, shuffle: bool) -> None:
    order = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]] * 2
    if shuffle:
        order = []
        for epoch in (0, 1):
            rows = list(range(10))
            random.Random(f"{SEED}-{epoch}").shuffle(rows)
            order += [rows[:4], rows[4:8], rows[8:]]
    losses, norms, weights = plain_loop(tiny_folder, order, RATES, 0.5, 0.1)
    result = loop.fit(shuffle=shuffle, **OPTIONS)
    assert loop.losses == pytest.approx(losses, abs=1e-5)
    assert [step["grad_norm"] for step in loop.steps] == pytest.approx(norms, abs=1e-4)
    assert [step["learning_rate"] for step in loop.steps] == pytest.approx(RATES)
    assert max(norms) > 1.5  # so that clipping to 0.5 matters
    assert near(loop.weights, weights, 1e-5)

    counts = [[len(SAMPLES[row].input_ids) for row in rows] for rows in order]
    assert [step["tokens"] for step in loop.steps] == [sum(step) for step in counts]
    assert [step["trained_tokens"] for step in loop.steps] == [sum(step) - 3 * len(step) for step in counts]
    sums = [sum(sum(SAMPLES[row].weights) for row in rows) for rows in order]
    assert result.metrics["train_loss"] == pytest.approx(sum(a * b for a, b in zip(losses, sums, strict=True)) / sum(sums))
    assert (result.metrics["steps"], result.metrics["tokens"]) == (6, sum(map(sum, counts)))
    saved = load_file(loop.output / "run" / "checkpoints" / "last" / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in loop.weights.items())


def test_expected_losses_of_a_fixed_seed(loop: Fixture) -> None:
    """Written down once: a change of any number of the run shows here."""
    loop.fit(held=HELD, **OPTIONS)
    assert loop.losses == pytest.approx(FIXED_LOSSES, abs=5e-4)
    assert loop.evals == pytest.approx(FIXED_EVALS, abs=5e-4)


FIXED_LOSSES = [5.58723, 5.52537, 5.34002, 5.00158, 4.91135, 4.75743]
FIXED_EVALS = [5.08435, 4.7985]


def test_accumulation_is_a_larger_batch(loop: Fixture) -> None:
    rest = {"learning_rate": 1e-3, "epochs": 2, "warmup": 0.0}
    loop.fit(folder="whole", batch_size=4, **rest)
    losses, weights = loop.losses, loop.weights
    for batch, accumulate in ((2, 2), (1, 4)):
        loop.fit(folder=f"{batch}", batch_size=batch, accumulate=accumulate, **rest)
        assert loop.losses == pytest.approx(losses, abs=1e-5)
        assert near(loop.weights, weights, 1e-4)  # AdamW magnifies the rounding of gradients near zero
    loop.fit(folder="smaller", batch_size=2, **rest)
    assert len(loop.losses) == 10
    assert loop.losses[0] != pytest.approx(losses[0], abs=1e-3)


def test_packed_equals_unpacked(loop: Fixture) -> None:
    """With a whole epoch a step, packs hold the same rows: three epochs give the same losses, norms and weights."""
    rest = {"batch_size": 10, "epochs": 3, "learning_rate": 3e-3, "eval_every": 1}
    loop.fit(held=HELD, folder="apart", **rest)
    losses, evals, weights = loop.losses, loop.evals, loop.weights
    tokens = [step["trained_tokens"] for step in loop.steps]
    seen = Collated()
    loop.fit(held=HELD, folder="packed", packing=True, max_length=64, prepare_run=seen.watch, **rest)
    assert loop.losses == pytest.approx(losses, abs=1e-5)
    assert loop.evals == pytest.approx(evals, abs=1e-5)
    assert [step["trained_tokens"] for step in loop.steps] == tokens
    assert near(loop.weights, weights, 1e-5)
    whole = sum(len(sample.input_ids) for sample in SAMPLES)
    assert (1, whole) in seen.shapes  # all packs of a pass are one row
    assert any(note.startswith("packed 10 samples into ") for note in loop.notes)


class Collated:
    """Shapes of the batches that a run's template made."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, int]] = []
        self.rows: list[list[int]] = []

    def watch(self, run: Run) -> None:
        original = run.template.collate

        def collate(samples: Any) -> Batch:
            batch = original(samples)
            rows, length = batch.inputs["input_ids"].shape
            self.shapes.append((rows, length))
            self.rows.append(batch.rows)
            return batch

        run.template.collate = collate  # type: ignore[method-assign]


def test_flat_equals_padded(loop: Fixture) -> None:
    """Laid end to end the samples of a pass give the losses, norms and weights that padding gives."""
    rest = {"batch_size": 4, "epochs": 2, "learning_rate": 1e-3}
    seen = {name: Collated() for name in ("always", "auto")}
    found = {}
    for padding, shapes in seen.items():
        loop.fit(held=HELD, folder=padding, padding=padding, prepare_run=shapes.watch, **rest)
        found[padding] = loop.losses, loop.evals, [step["grad_norm"] for step in loop.steps], loop.weights
    for mine, theirs in zip(found["auto"][:3], found["always"][:3], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5, rel=1e-5)
    assert near(found["auto"][3], found["always"][3], 1e-4)
    assert {rows for rows, _ in seen["auto"].shapes} == {1}
    assert {rows for rows, _ in seen["always"].shapes} == {2, 4}


def test_a_flat_pass_is_cut_where_the_backend_gains_nothing(loop: Fixture) -> None:
    rest = {"batch_size": 10, "epochs": 2, "learning_rate": 3e-3}
    loop.fit(held=HELD, folder="whole", **rest)
    losses, evals, weights = loop.losses, loop.evals, loop.weights
    seen = Collated()

    def limit(run: Run) -> None:
        seen.watch(run)
        type(run.backend).pass_tokens = 50  # type: ignore[attr-defined,assignment]

    kept = TorchBackend.pass_tokens
    try:
        loop.fit(held=HELD, folder="cut", prepare_run=limit, **rest)
    finally:
        TorchBackend.pass_tokens = kept  # type: ignore[method-assign]
    assert loop.losses == pytest.approx(losses, abs=1e-5)
    assert loop.evals == pytest.approx(evals, abs=1e-5)
    assert near(loop.weights, weights, 1e-4)
    assert all(rows == 1 and length <= 60 for rows, length in seen.shapes[3:])
    assert len(seen.shapes) > 8


def test_batch_tokens_gives_the_same_step(loop: Fixture) -> None:
    """With a whole epoch a step, how its rows are cut into passes changes nothing."""
    rest = {"learning_rate": 3e-3, "epochs": 2}
    loop.fit(folder="whole", batch_size=10, **rest)
    losses, weights = loop.losses, loop.weights
    for padding in ("auto", "always"):
        seen = Collated()
        loop.fit(folder=padding, batch_tokens=50, accumulate=10, padding=padding, prepare_run=seen.watch, **rest)
        assert loop.losses == pytest.approx(losses, abs=1e-5)
        assert near(loop.weights, weights, 1e-4)
        assert all(rows * length <= (96 if padding == "auto" else 50) for rows, length in seen.shapes)
        assert len(seen.shapes) > 4


# --- evaluation, checkpoints, stopping ----------------------------------------------------------------------------------


def test_evaluation_is_the_held_rows_mean(loop: Fixture, tiny_folder: Path) -> None:
    result = loop.fit(held=HELD, batch_size=4, epochs=2, learning_rate=3e-3)
    model = AutoModelForCausalLM.from_pretrained(loop.output / "run" / "checkpoints" / "last", dtype=torch.float32)
    with torch.no_grad():
        total, weight = loss_of(model, HELD)
    assert len(loop.evals) == 2  # once an epoch
    assert loop.evals[-1] == result.metrics["eval_loss"] == pytest.approx(float(total) / weight, abs=1e-5)


def evaluating(losses: list[float]) -> Callable[[Run], None]:
    """Make a run's evaluations give these losses."""

    def change(run: Run) -> None:
        original, told = run.backend.prepare, iter(losses)

        def made(*args: Any) -> Any:
            steps = original(*args)
            steps.evaluate = lambda batches, loss_fn: StepResult(next(told), 1.0, 1, 1)
            return steps

        run.backend.prepare = made  # type: ignore[method-assign]

    return change


def test_patience_best_last_and_keep(loop: Fixture) -> None:
    """The best is step 2; steps 3 and 4 are no better, an equal loss is not better either."""
    result = loop.fit(
        held=HELD, prepare_run=evaluating([3.0, 2.0, 2.5, 2.0, 1.0]), batch_size=2, epochs=2, eval_every=1, patience=2, keep=1
    )
    assert result.stopped == "no better eval loss in 2 evaluations"
    assert loop.notes[-1] == "stopped at step 4: no better eval loss in 2 evaluations"
    assert loop.folders() == ["best", "last", "step-2", "step-4"]
    folder = loop.output / "run" / "checkpoints"
    assert (str((folder / "best").readlink()), str((folder / "last").readlink())) == ("step-2", "step-4")
    assert (result.best, result.last) == (folder / "step-2", folder / "step-4")
    metrics = result.metrics
    assert (metrics["steps"], metrics["best_step"], metrics["best_eval_loss"], metrics["eval_loss"]) == (4, 2, 2.0, 2.0)


@pytest.mark.parametrize(
    ("keep", "kept"), [(0, ["step-1", "step-2", "step-3", "step-4", "step-5"]), (2, ["step-1", "step-4", "step-5"])]
)
def test_keep(loop: Fixture, keep: int, kept: list[str]) -> None:
    """The best, here the first, stays besides the newest."""
    loop.fit(held=HELD, prepare_run=evaluating([1.0, 2.0, 3.0, 4.0, 5.0]), batch_size=2, eval_every=1, keep=keep)
    assert loop.folders() == ["best", "last", *kept]


def test_when_it_evaluates_saves_and_reports(loop: Fixture) -> None:
    evals = evaluating([9.0 - n for n in range(9)])
    loop.fit(held=HELD, prepare_run=evals, batch_size=4, epochs=3, keep=0, folder="epochs")
    assert loop.folders("epochs") == ["best", "last", "step-3", "step-6", "step-9"]
    loop.fit(
        held=HELD, prepare_run=evaluating([9.0] * 9), batch_size=4, epochs=3, keep=0, eval_every=4, save_every=2, log_every=5
    )
    assert loop.folders() == ["best", "last", "step-2", "step-4", "step-6", "step-8", "step-9"]  # 9: the end
    assert len(loop.evals) == 3  # at 4, 8 and 9
    assert [step["step"] for step in loop.steps] == [5, 9]
    loop.fit(batch_size=4, epochs=3, keep=0, max_steps=2, folder="short")
    assert loop.folders("short") == ["last", "step-2"]


def test_a_better_evaluation_is_saved_between_times(loop: Fixture) -> None:
    evals = evaluating([3.0, 4.0, 2.0, 5.0, 6.0])
    loop.fit(held=HELD, prepare_run=evals, batch_size=2, eval_every=1, save_every=100, keep=0)
    assert loop.folders() == ["best", "last", "step-1", "step-3", "step-5"]


def test_resume_is_exact(loop: Fixture) -> None:
    loop.fit(held=HELD, folder="straight", save_every=2, eval_every=2, keep=0, **OPTIONS)
    losses, evals, weights = loop.losses, loop.evals, loop.weights
    assert loop.folders("straight") == ["best", "last", "step-2", "step-4", "step-6"]

    def resume(run: Run) -> None:
        run.resume_from = loop.output / "straight" / "checkpoints" / "step-2"
        run.backend.seed(1)

    result = loop.fit(held=HELD, folder="resumed", save_every=2, eval_every=2, keep=0, prepare_run=resume, **OPTIONS)
    assert loop.losses == losses[2:]
    assert loop.evals == evals[1:]
    assert all(torch.equal(loop.weights[name], tensor) for name, tensor in weights.items())
    assert result.metrics["steps"] == 6
    whole = json.loads((loop.output / "straight/checkpoints/step-6/trainer.json").read_text())
    again = json.loads((loop.output / "resumed/checkpoints/step-6/trainer.json").read_text())
    assert {**whole, "seconds": 0} == {**again, "seconds": 0}
    # Resumed at its end, a run has nothing left to do, and writes nothing again.
    done = loop.fit(
        folder="done",
        prepare_run=lambda run: setattr(run, "resume_from", loop.output / "straight/checkpoints/step-6"),
        **OPTIONS,
    )
    assert (loop.losses, done.metrics["steps"], done.last) == ([], 6, None)


def test_a_run_that_is_stopped_saves_its_step(loop: Fixture) -> None:
    def stop(run: Run) -> None:
        def listen(event: Any) -> None:
            if event.kind == "step" and event.data["step"] == 3:
                run.stop = "the bell rang"

        run.events.add(listen)

    result = loop.fit(prepare_run=stop, batch_size=2, save_every=100)
    assert result.stopped == "the bell rang"
    assert loop.folders() == ["last", "step-3"]
    assert loop.notes[-1] == "stopped at step 3: the bell rang"


def test_a_failed_save_keeps_the_last_good_checkpoint(loop: Fixture) -> None:
    def fail(run: Run) -> None:
        tuned = run.models.get("policy")
        original, calls = tuned.save, []

        def save(folder: Path) -> None:
            original(folder)
            calls.append(folder)
            if len(calls) == 2:
                raise OSError(28, "No space left on device")

        tuned.save = save  # type: ignore[method-assign]

    folder = loop.output / "run" / "checkpoints"
    with pytest.raises(RunError, match=rf"^saving step 2 .*No space left.*; the last good checkpoint is {folder / 'step-1'}$"):
        loop.fit(prepare_run=fail, batch_size=2, save_every=1)
    assert loop.folders() == ["last", "step-1"]


def test_warm_start_takes_the_weights_and_nothing_else(loop: Fixture) -> None:
    loop.fit(folder="first", batch_size=4, epochs=3, learning_rate=3e-3)
    trained = loop.output / "first" / "checkpoints" / "last"
    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)
    with torch.no_grad():
        total, weight = loss_of(model, SAMPLES[:4])
    loop.fit(
        folder="second", prepare_run=lambda run: setattr(run, "warm_start", trained), batch_size=4, shuffle=False, max_steps=1
    )
    assert loop.steps[0]["step"] == 1
    assert loop.losses[0] == pytest.approx(float(total) / weight, abs=1e-5)


def test_the_run_may_name_an_optimizer(loop: Fixture) -> None:
    """A part of kind optimizer: here plain gradient descent without momentum."""
    asked: list[tuple[str, str]] = []

    def part(run: Run) -> None:
        def made(kind: str, name: str) -> Any:
            asked.append((kind, name))
            return lambda groups, rate, decay: torch.optim.SGD(groups, lr=rate)

        run.part = made

    rest = {"batch_size": 10, "learning_rate": 0.5, "clip": None, "schedule": "constant", "warmup": 0.0}
    loop.fit(prepare_run=part, optimizer="descent", **rest)
    assert asked == [("optimizer", "descent")]
    model = AutoModelForCausalLM.from_pretrained(loop.model, dtype=torch.float32)
    total, weight = loss_of(model, SAMPLES)
    (total / weight).backward()
    expected = {name: p.detach() - 0.5 * p.grad for name, p in model.named_parameters()}
    assert near(loop.weights, expected, 1e-5)


def test_lora_trains_its_adapter_only(loop: Fixture) -> None:
    loop.fit(tuner="lora", batch_size=4, epochs=3, learning_rate=2e-2)
    assert loop.losses[-1] < loop.losses[0] - 0.05
    base = AutoModelForCausalLM.from_pretrained(loop.model).state_dict()
    weights = {name.replace("base_model.model.", "").replace("base_layer.", ""): t for name, t in loop.weights.items()}
    assert all(torch.equal(weights[name], base[name]) for name in weights if "lora_" not in name)
    assert (loop.output / "run" / "checkpoints" / "last" / "adapter_model.safetensors").is_file()
    assert loop.notes[0].startswith("training 16,384 of 107,008 parameters")


def test_a_template_that_cannot_pack_is_told(loop: Fixture) -> None:
    def refuse(run: Run) -> None:
        run.template.pack = lambda samples: None  # type: ignore[method-assign]

    with pytest.raises(RequestError, match=r"^trainer.packing: this template cannot isolate samples laid end to end; set it"):
        loop.fit(prepare_run=refuse, packing=True)


def test_a_model_that_does_not_isolate_packed_samples_is_told(loop: Fixture) -> None:
    """As a state-space model would: positions that do not begin again are not heeded."""

    def join(run: Run) -> None:
        original = run.template.collate

        def collate(samples: Any) -> Batch:
            batch = original(samples)
            batch.inputs.pop("cu_seq_lens_q", None)
            batch.inputs.pop("position_ids", None)
            return batch

        run.template.collate = collate  # type: ignore[method-assign]

    with pytest.raises(
        RequestError, match=r"^trainer.packing: this model lets samples laid end to end see each other \(logits differ by "
    ):
        loop.fit(prepare_run=join, packing=True, max_length=64)
    loop.fit(folder="padded", batch_size=10)
    losses = loop.losses
    loop.fit(folder="refused", prepare_run=join, batch_size=10)
    assert loop.losses == losses  # padded, and so it is said
    assert any(note.startswith("padding the samples of a pass: this model lets samples") for note in loop.notes)


def test_a_run_that_ran_out_of_patience_stays_so_when_resumed(loop: Fixture) -> None:
    rest = {"held": HELD, "batch_size": 2, "eval_every": 1, "patience": 2}
    loop.fit(prepare_run=evaluating([1.0, 2.0, 2.0]), **rest)

    def resume(run: Run) -> None:
        run.resume_from = loop.output / "run" / "checkpoints" / "last"

    result = loop.fit(prepare_run=resume, **rest)
    assert (loop.losses, result.metrics["steps"]) == ([], 3)
    assert result.stopped == "no better eval loss in 2 evaluations"


def test_nothing_predicts_a_first_token(loop: Fixture) -> None:
    """As in pre-training, where every token has a weight."""
    samples = [replace(sample, weights=[1.0] * len(sample.input_ids)) for sample in SAMPLES]
    loop.fit(samples=samples, kind=PretrainConfig, batch_size=10)
    tokens = sum(len(sample.input_ids) for sample in samples)
    assert (loop.steps[0]["tokens"], loop.steps[0]["trained_tokens"]) == (tokens, tokens - len(samples))


def test_samples_are_left_as_they_were(loop: Fixture) -> None:
    """Packing and collation make new samples: those of the run are used again, each epoch."""
    samples = [replace(sample) for sample in SAMPLES]
    loop.fit(samples=samples, packing=True, max_length=64, epochs=2)
    assert samples == make_samples(10, 1)
