"""One step in other forms of the same work: prompts computed once or padded, one pass or several, references of each kind."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from swift_core.errors import RequestError
from swift_core.parts import parts
from swift_core.types import Sample
from swift_plugin_preference.ahead import Kept, key_of
from swift_plugin_preference.meter import Meter
from swift_plugin_preference.testing import ASKED, BETTER, LABELLED, PAIRS, WORSE, apart, encoded, opened, pair, step
from swift_plugin_torch.backend import TorchBackend

SYSTEM = "Answer as a kind clerk of a small harbour would, in a word or two."
LONG = [pair(*texts, system=SYSTEM) for texts in zip(ASKED, BETTER, WORSE, strict=True)]


@pytest.mark.parametrize(
    ("trainer", "options"),
    [
        ("dpo", {"rpo_alpha": 0.5}), ("dpo", {"loss": "ipo", "ld_alpha": 0.3}), ("orpo", {}), ("orpo", {"nll": "answer"}),
        ("cpo", {}), ("simpo", {}), ("kto", {"beta": 0.3}),
    ],
)  # fmt: skip
def test_shared_prompts_flat_and_padded_passes_are_the_same(
    trainer: str, options: dict[str, Any], tiny_folder: Path, tmp_path: Path
) -> None:
    rows = [{"messages": row["messages"], "label": n % 2 == 0} for n, row in enumerate(LONG)] if trainer == "kto" else LONG
    padded = step(tiny_folder, tmp_path, trainer, rows, flat=False, shares=False, **options)
    for shares in (False, True):
        found = step(tiny_folder, tmp_path, trainer, rows, flat=True, shares=shares, **options)
        assert found.loss == pytest.approx(padded.loss, abs=1e-5)
        assert apart(found.grads, padded.grads) < 1e-5
        assert found.figures == pytest.approx(padded.figures, abs=1e-4)
    if trainer != "kto":  # the prompts were held once indeed
        held = sum(batch.labels.numel() for batch in found.batches)
        tokens = sum(batch.tokens for batch in padded.batches)
        assert held < 0.65 * tokens


@pytest.mark.parametrize(
    ("trainer", "options"),
    [("dpo", {"loss": "sft,sigmoid"}), ("dpo", {}), ("orpo", {}), ("cpo", {"loss": "simpo"}), ("kto", {"beta": 0.3})],
)
def test_several_passes_are_one_large_one(trainer: str, options: dict[str, Any], tiny_folder: Path, tmp_path: Path) -> None:
    rows = LABELLED if trainer == "kto" else PAIRS
    one = step(tiny_folder, tmp_path, trainer, rows, **options)
    for passes in (2, 4):
        found = step(tiny_folder, tmp_path, trainer, rows, passes=passes, **options)
        assert len(found.batches) == passes
        assert found.loss == pytest.approx(one.loss, abs=1e-5)
        assert apart(found.grads, one.grads) < 1e-5


def test_a_pass_is_cut_between_pairs_but_for_losses_that_sort(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TorchBackend, "pass_tokens", 100)
    for loss, count in (("sigmoid", 4), ("aot", 1)):
        with opened(tiny_folder, tmp_path, "dpo", loss=loss) as made:
            made.flat, made.shares = True, True
            batches = list(made._batches(encoded(made, PAIRS)))
            assert len(batches) == count
            assert sum(batch.weight for batch in batches) == 4


def test_a_copy_and_what_is_switched_off_are_the_same_reference(tiny_folder: Path, tmp_path: Path) -> None:
    off = step(tiny_folder, tmp_path, "dpo", PAIRS)
    copy = step(tiny_folder, tmp_path, "dpo", PAIRS, models={"reference": str(tiny_folder)})
    assert copy.loss == pytest.approx(off.loss, abs=1e-6)
    assert apart(copy.grads, off.grads) < 1e-6
    free = step(tiny_folder, tmp_path, "dpo", PAIRS, reference_free=True)
    chosen, rejected = free.figures["logps_chosen"], free.figures["logps_rejected"]
    assert free.figures["reward_margin"] == pytest.approx(0.1 * (chosen - rejected), abs=1e-4)
    assert abs(free.loss - off.loss) > 1e-3


def test_an_adapter_has_its_model_as_reference(tiny_folder: Path, tmp_path: Path) -> None:
    """Of LoRA, whose base was disturbed here along with it, the reference is the disturbed base: a new adapter says nothing."""
    found = step(tiny_folder, tmp_path, "dpo", PAIRS, tuner={"name": "lora", "rank": 4})
    assert found.grads
    assert all("lora" in name for name in found.grads)


def test_kept_log_probabilities(tmp_path: Path) -> None:
    groups = [[Sample([n, n + 1], [0.0, 1.0]), Sample([n, n + 2], [0.0, 1.0])] for n in range(5)]
    keys = [key_of(group) for group in groups]
    asked: list[int] = []

    def values(n: int) -> torch.Tensor:
        asked.append(n)
        return torch.tensor([[float(n), -float(n)]])

    def batches() -> Any:
        return (([keys[n]], lambda n=n: values(n)) for n in range(5))

    kept = Kept(tmp_path, ["one"])
    kept.fill(list(batches())[:3], rank=0)
    (tmp_path / f"{kept.name}-0-00007.safetensors").write_bytes(b"half a file")
    again = Kept(tmp_path, ["one"])
    again.read()
    again.fill(batches(), rank=1)
    assert asked == [0, 1, 2, 3, 4]  # nothing twice
    whole = Kept(tmp_path, ["one"])
    whole.read()
    assert whole.get([keys[4], keys[0]]).tolist() == [[4.0, -4.0], [0.0, 0.0]]
    other = Kept(tmp_path, ["two"])
    other.read()
    assert other.values == {}
    assert key_of([Sample([1], [1.0])]) != key_of([Sample([1], [0.5])])


def test_means_of_a_meter() -> None:
    meter = Meter()
    meter.add({"rewards_chosen": torch.tensor([1.0, 2.0]), "rewards_rejected": torch.tensor([])})
    meter.add({"rewards_chosen": torch.tensor([6.0]), "rewards_rejected": torch.tensor([1.0])})
    assert meter.result() == {"rewards_chosen": 3.0, "rewards_rejected": 1.0, "reward_margin": 2.0}
    assert meter.result() == {}


# --- pictures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sys.path.insert(0, str(Path(__file__).parents[3] / "models" / "transformers" / "tests"))
    import media_models

    folder = tmp_path_factory.mktemp("seeing")
    tiny = media_models.MODELS["llava"]()
    tiny.model.save_pretrained(folder)
    tiny.processor.save_pretrained(folder)
    for n in range(2):
        media_models.picture(n + 1, (16, 16)).save(folder / f"{n}.png")
    return folder


def with_pictures(folder: Path) -> list[dict[str, Any]]:
    shown = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    rows = []
    for n, (better, worse) in enumerate((("A cat.", "A dog."), ("An elk.", "A boat, I think."))):
        row = pair("", better, worse, images=[str(folder / f"{n}.png")])
        row["messages"][0]["content"] = row["rejected"][0]["content"] = shown
        rows.append(row)
    return rows


def test_pairs_with_pictures(seeing: Path, tmp_path: Path) -> None:
    rows = with_pictures(seeing)
    copy = {"models": {"reference": str(seeing)}}
    padded = step(seeing, tmp_path, "dpo", rows, flat=False, shares=False, **copy)
    flat = step(seeing, tmp_path, "dpo", rows, **copy)
    assert flat.loss == pytest.approx(padded.loss, abs=1e-5)
    assert apart(flat.grads, padded.grads) < 1e-5
    vision = [grad for name, grad in padded.grads.items() if "vision" in name or "projector" in name]
    assert max(float(grad.abs().max()) for grad in vision) > 1e-5  # the picture is seen
    with opened(seeing, tmp_path, "dpo") as made:
        (first, _) = encoded(made, rows)
        assert [part.media for part in parts(first)] == [first.media, first.media]
    labelled = [{"messages": row["messages"], "images": row["images"], "label": n == 0} for n, row in enumerate(rows)]
    assert step(seeing, tmp_path, "kto", labelled, flat=False, shares=False, beta=0.3, **copy).figures["kl"] > 0
    adapters = [step(seeing, tmp_path, "dpo", rows, flat, tuner={"name": "lora", "rank": 4}) for flat in (True, False)]
    assert adapters[0].loss == pytest.approx(adapters[1].loss, abs=1e-5)
    assert 1e-6 < abs(adapters[0].loss - math.log(2)) < 0.1  # near its reference, which is itself switched off


def test_prompts_with_pictures_are_not_imitated(seeing: Path, tmp_path: Path) -> None:
    rows = with_pictures(seeing)
    assert step(seeing, tmp_path, "orpo", rows, nll="answer").loss > 0
    with pytest.raises(RequestError, match=r"trainer.orpo: rows with media .* set trainer.nll=answer"):
        step(seeing, tmp_path, "orpo", rows)
