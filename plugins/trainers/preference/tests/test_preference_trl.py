"""Losses and gradients of one step against TRL's trainers, on the same weights and rows, in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from swift_core.parts import parts
from swift_core.types import Sample
from swift_plugin_preference.forms import first_trained
from swift_plugin_preference.testing import LABELLED, PAIRS, Step, apart, disturb, encoded, opened, step
from transformers import AutoModelForCausalLM, AutoTokenizer

trl = pytest.importorskip("trl")
Dataset = pytest.importorskip("datasets").Dataset
TOLERANCE = 1e-5


def split(sample: Sample) -> tuple[list[int], list[int]]:
    """Prompt and answer."""
    start = first_trained(sample)
    assert all(sample.weights[start:]) or not sample.weights[-1]  # a template may end with what is not trained
    end = max(n for n, weight in enumerate(sample.weights) if weight) + 1
    return sample.input_ids[:start], sample.input_ids[start:end]


def ended(sample: Sample) -> Sample:
    """Without what stands behind the answer, which TRL would train."""
    prompt, answer = split(sample)
    return Sample(prompt + answer, [0.0] * len(prompt) + [1.0] * len(answer), label=sample.label)


def rows_of(folder: Path, output: Path, trainer: str, rows: list[dict[str, Any]]) -> list[list[Sample]]:
    with opened(folder, output, trainer) as made:
        return [parts(sample) for sample in encoded(made, rows)]


def models(folder: Path) -> tuple[Any, Any]:
    """The disturbed policy, and its reference."""
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    disturb(policy)
    return policy, reference


def common(output: Path, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(output), "per_device_train_batch_size": 4, "use_cpu": True, "report_to": [], "bf16": False,
        "gradient_checkpointing": False, "max_length": None, "disable_tqdm": True, **options,
    }  # fmt: skip


def graded(model: Any, loss: torch.Tensor) -> Step:
    model.zero_grad()
    loss.backward()
    return Step(float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


class Dpo:
    """TRL's DPOTrainer, made once; a test sets what its configuration would."""

    def __init__(self, folder: Path, output: Path) -> None:
        policy, reference = models(folder)
        texts = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4)
        self.trainer = trl.DPOTrainer(
            policy, reference, trl.DPOConfig(**common(output)), train_dataset=texts,
            processing_class=AutoTokenizer.from_pretrained(folder),
        )  # fmt: skip
        groups = rows_of(folder, output, "dpo", PAIRS)
        examples = []
        for chosen, rejected in groups:
            (prompt, better), (_, worse) = split(chosen), split(rejected)
            examples.append({"prompt_ids": prompt, "chosen_ids": better, "rejected_ids": worse})
        self.inputs = self.trainer.data_collator(examples)

    def step(self, **settings: Any) -> Step:
        t = self.trainer
        named = {"loss_types": ["sigmoid"], "beta": 0.1, "label_smoothing": 0.0, "ld_alpha": None}
        named |= {"f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5}
        for name, value in (named | settings).items():
            setattr(t, name, value)
        t.loss_weights = settings.get("loss_weights", [1.0] * len(t.loss_types))
        return graded(t.model, t._compute_loss(t.model, dict(self.inputs), return_outputs=False))


@pytest.fixture(scope="module")
def theirs(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Dpo:
    return Dpo(tiny_folder, tmp_path_factory.mktemp("trl"))


def check(mine: Step, other: Step) -> None:
    assert mine.loss == pytest.approx(other.loss, abs=TOLERANCE, rel=TOLERANCE)
    assert apart(mine.grads, other.grads) < TOLERANCE
    assert max(float(grad.abs().max()) for grad in other.grads.values()) > 1e-3  # there is something to compare


SMOOTHED = {"robust": 0.1, "exo_pair": 1e-3, "aot": 0.1, "aot_unpaired": 0.1}
LOSSES = (
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft",
)  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_a_dpo_loss_and_its_gradient_are_trls(name: str, theirs: Dpo, tiny_folder: Path, tmp_path: Path) -> None:
    smoothing = SMOOTHED.get(name, 0.0)
    other = theirs.step(loss_types=[name], label_smoothing=smoothing)
    check(step(tiny_folder, tmp_path, "dpo", PAIRS, loss=name, label_smoothing=smoothing), other)


@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
def test_divergences_are_trls(divergence: str, theirs: Dpo, tiny_folder: Path, tmp_path: Path) -> None:
    kind = {"forward_kl": "forward_kl", "js": "js_divergence", "alpha": "alpha_divergence"}[divergence]
    for name, alpha in (("sigmoid", 0.3), ("ipo", 1.7), ("hinge", 1.0)):
        other = theirs.step(loss_types=[name], f_divergence_type=kind, f_alpha_divergence_coef=alpha)
        own = {"divergence_alpha": alpha} if divergence == "alpha" else {}
        mine = step(tiny_folder, tmp_path, "dpo", PAIRS, loss=name, divergence=divergence, **own)
        check(mine, other)


def test_a_mixture_and_shortened_answers_are_trls(theirs: Dpo, tiny_folder: Path, tmp_path: Path) -> None:
    mixed = [{"name": "sigmoid", "weight": 0.8}, {"name": "bco_pair", "weight": 0.2}, "sft"]
    other = theirs.step(loss_types=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0], beta=0.3)
    check(step(tiny_folder, tmp_path, "dpo", PAIRS, loss=mixed, beta=0.3), other)
    other = theirs.step(ld_alpha=0.4, beta=0.2)
    check(step(tiny_folder, tmp_path, "dpo", PAIRS, ld_alpha=0.4, beta=0.2), other)


def test_figures_are_trls(theirs: Dpo, tiny_folder: Path, tmp_path: Path) -> None:
    theirs.trainer._metrics["eval"].clear()
    theirs.step(beta=0.3)
    other = {name: values[-1] for name, values in theirs.trainer._metrics["eval"].items()}
    mine = step(tiny_folder, tmp_path, "dpo", PAIRS, beta=0.3).figures
    for name, trls in (
        ("rewards_chosen", "rewards/chosen"), ("rewards_rejected", "rewards/rejected"), ("reward_margin", "rewards/margins"),
        ("reward_accuracy", "rewards/accuracies"), ("logps_chosen", "logps/chosen"), ("logps_rejected", "logps/rejected"),
    ):  # fmt: skip
        assert mine[name] == pytest.approx(other[trls], abs=1e-4), name


# --- without a reference ----------------------------------------------------------------------------------------------


def unpaired_batch(groups: list[list[Sample]], pad: int) -> dict[str, torch.Tensor]:
    """What TRL's collator of ORPO and CPO makes of pairs."""
    found: dict[str, torch.Tensor] = {}
    for name, place in (("chosen", 0), ("rejected", 1)):
        made = [ended(group[place]) for group in groups]
        width = max(len(sample.input_ids) for sample in made)
        ids, labels, mask = (torch.full((len(made), width), value) for value in (pad, -100, 0))
        for n, sample in enumerate(made):
            count = len(sample.input_ids)
            ids[n, :count], mask[n, :count] = torch.tensor(sample.input_ids), 1
            start = first_trained(sample)
            labels[n, start:count] = torch.tensor(sample.input_ids[start:])
        found |= {f"{name}_input_ids": ids, f"{name}_labels": labels, f"{name}_attention_mask": mask}
    return found


def reference_free(folder: Path, output: Path, kind: str, **options: Any) -> Any:
    if kind == "orpo":
        from trl.experimental.orpo import ORPOConfig as Config
        from trl.experimental.orpo import ORPOTrainer as Trainer
    else:
        from trl.experimental.cpo import CPOConfig as Config
        from trl.experimental.cpo import CPOTrainer as Trainer
    policy, _ = models(folder)
    texts = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4)
    args = Config(**{**common(output, **options), "max_length": 512})
    return Trainer(policy, args, train_dataset=texts, processing_class=AutoTokenizer.from_pretrained(folder))


@pytest.fixture(scope="module")
def groups(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[Sample]]:
    return rows_of(tiny_folder, tmp_path_factory.mktemp("rows"), "dpo", PAIRS)


def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """End the samples of a run where the answer ends: TRL's imitation of a whole conversation goes to the last token."""
    from swift_core.parts import join
    from swift_plugin_preference import testing

    plain = testing.encoded

    def shorter(trainer: Any, rows: Any) -> Any:
        return [join([ended(part) for part in parts(sample)]) for sample in plain(trainer, rows)]

    monkeypatch.setattr(testing, "encoded", shorter)


def test_orpo_is_trls(groups: Any, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch)
    other = reference_free(tiny_folder, tmp_path, "orpo", beta=0.25)
    loss, metrics = other.get_batch_loss_metrics(other.model, unpaired_batch(groups, 0))
    wanted = graded(other.model, loss)
    for flat, shares in ((True, True), (True, False), (False, False)):
        mine = step(tiny_folder, tmp_path, "orpo", PAIRS, flat, shares, beta=0.25)
        check(mine, wanted)
    assert mine.figures["reward_margin"] == pytest.approx(metrics["rewards/margins"], abs=1e-4)


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo", "simpo"])
def test_cpo_is_trls(loss: str, groups: Any, tiny_folder: Path, tmp_path: Path) -> None:
    options = {"beta": 0.7, "cpo_alpha": 0.5}
    options |= {"label_smoothing": 0.1} if loss in ("sigmoid", "simpo") else {}
    other = reference_free(tiny_folder, tmp_path, "cpo", loss_type=loss, simpo_gamma=0.8, **options)
    wanted = graded(other.model, other.get_batch_loss_metrics(other.model, unpaired_batch(groups, 0))[0])
    options |= {"gamma": 0.8} if loss == "simpo" else {}
    check(step(tiny_folder, tmp_path, "cpo", PAIRS, loss=loss, **options), wanted)


def test_simpo_is_trls(groups: Any, tiny_folder: Path, tmp_path: Path) -> None:
    other = reference_free(tiny_folder, tmp_path, "cpo", loss_type="simpo", simpo_gamma=1.0, beta=2.0, cpo_alpha=0.0)
    wanted = graded(other.model, other.get_batch_loss_metrics(other.model, unpaired_batch(groups, 0))[0])
    check(step(tiny_folder, tmp_path, "simpo", PAIRS), wanted)


# --- labelled answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_kto_is_trls(loss: str, tiny_folder: Path, tmp_path: Path) -> None:
    samples = [ended(group[0]) for group in rows_of(tiny_folder, tmp_path, "kto", LABELLED)]
    policy, reference = models(tiny_folder)
    texts = Dataset.from_list([{"prompt": "a", "completion": "b", "label": True}] * 4)
    args = trl.KTOConfig(
        **common(tmp_path), loss_type=loss, beta=0.3, desirable_weight=1.3, undesirable_weight=0.7, remove_unused_columns=False
    )
    other = trl.KTOTrainer(
        policy, reference, args, train_dataset=texts, processing_class=AutoTokenizer.from_pretrained(tiny_folder)
    )
    answers = [split(sample)[1] for sample in samples]
    examples = [
        {"prompt_ids": split(sample)[0], "completion_ids": answers[n], "KL_completion_ids": answers[n - 1],
         "label": sample.label["good"]}
        for n, sample in enumerate(samples)
    ]  # fmt: skip
    inputs = other.data_collator(examples)
    wanted = graded(other.model, other._compute_loss(other.model, inputs, return_outputs=False))
    options = {"loss": loss, "beta": 0.3, "desirable": 1.3, "undesirable": 0.7}
    mine = step(tiny_folder, tmp_path, "kto", LABELLED, **options)
    check(mine, wanted)
    if loss == "kto":
        assert mine.figures["kl"] == pytest.approx(other._metrics["eval"]["kl"][-1], abs=1e-4)
        assert mine.figures["kl"] > 1e-3
    assert mine.figures["reward_margin"] == pytest.approx(other._metrics["eval"]["rewards/margins"][-1], abs=1e-4)
