"""Losses, gradients and advantages against TRL's own trainers: their code runs on the same weights, answers and rewards.

TRL's GRPOTrainer and RLOOTrainer are built on a copy of the model; only the drawing of answers and the rewards' values are
given to them. What is compared went through our batches, shared prompts included.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from swift_core.types import ModelBundle
from swift_plugin_grpo.advantages import advantages
from swift_plugin_grpo.batches import Batcher, by_answer, tokens_of
from swift_plugin_grpo.config import GrpoConfig
from swift_plugin_grpo.losses import high_entropy, normaliser, policy_loss
from swift_plugin_grpo.prompts import Prompt
from swift_plugin_grpo.rollouts import begin
from swift_plugin_grpo.scoring import Group, Scored
from swift_plugin_torch.backend import TorchBackend
from swift_plugin_torch.config import TorchConfig

trl = pytest.importorskip("trl")
PROMPTS, ANSWERS, MOST = 3, 4, 12
END = 2  # <|im_end|>
NAN = float("nan")


def rewards() -> torch.Tensor:
    """[P, G, R]: one group without spread, one reward not given."""
    drawn = torch.randn(PROMPTS, ANSWERS, 2, generator=torch.Generator().manual_seed(4))
    drawn[1] = 0.5
    drawn[2, 3, 0] = NAN
    return drawn


def answers_of() -> list[list[list[int]]]:
    """Answers of 1 to 12 tokens; one in each group was cut."""
    made = torch.Generator().manual_seed(5)
    found = []
    for _ in range(PROMPTS):
        lengths = [*torch.randint(1, MOST - 1, (ANSWERS - 1,), generator=made).tolist(), MOST]
        group = [torch.randint(5, 250, (length,), generator=made).tolist() for length in lengths]
        found.append([[*ids, END] if len(ids) < MOST else ids for ids in group])
    return found


def prompts_of() -> list[list[int]]:
    return [list(range(10 + 40 * n, 10 + 40 * n + 12 + 3 * n)) for n in range(PROMPTS)]


def trl_trainer(bundle: ModelBundle, folder: Path, kind: str = "grpo", **options: Any) -> Any:
    """TRL's trainer on a copy of the model, its answers and rewards given."""
    from datasets import Dataset

    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    config, trainer = {"grpo": (trl.GRPOConfig, trl.GRPOTrainer), "rloo": (trl.RLOOConfig, trl.RLOOTrainer)}[kind]
    names = {"max_completion_length": MOST, "num_generations": ANSWERS, "per_device_train_batch_size": PROMPTS * ANSWERS}
    args = config(
        output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, logging_steps=1,
        **(names | options),
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": "a"}] * (PROMPTS * ANSWERS))
    functions = [lambda completions, **_: [0.0] * len(completions), lambda completions, **_: [0.0] * len(completions)]
    functions[1].__name__ = "second"
    given = {"args": args, "train_dataset": rows, "processing_class": bundle.processor}
    made = trainer(model=copy.deepcopy(bundle.model), reward_funcs=functions, **given)
    prompts = [ids for ids in prompts_of() for _ in range(ANSWERS)]
    said = [ids for group in answers_of() for ids in group]

    def generate(_: Any) -> tuple[Any, ...]:
        drawn = sampled() if getattr(made, "use_vllm", False) else None
        if kind == "rloo":
            return prompts, said, ["x"] * len(said)
        return prompts, said, None, ["x"] * len(said), drawn, {}, None, None

    made._generate = generate
    made._calculate_rewards = lambda *_: rewards().view(-1, 2)
    made.model.train()
    made.current_gradient_accumulation_steps = 1
    return made


def sampled() -> list[list[float]]:
    """What an engine says that it drew the answers with."""
    made = torch.Generator().manual_seed(6)
    return [(-5.6 + 0.6 * torch.randn(len(ids), generator=made)).tolist() for group in answers_of() for ids in group]


def noise(values: torch.Tensor, seed: int) -> torch.Tensor:
    return values + 0.3 * torch.randn(values.shape, generator=torch.Generator().manual_seed(seed))


class Ours:
    """Our side on a copy of the model: advantages, then the loss and its gradient through the backend's steps."""

    def __init__(self, bundle: ModelBundle, config: GrpoConfig, flat: bool = True) -> None:
        from types import SimpleNamespace

        from swift_core.session import FrozenModel

        self.config, self.model = config, copy.deepcopy(bundle.model)
        self.told: tuple[
            list[torch.Tensor], ...
        ] = ()  # old and reference's log-probabilities, of which a reward takes its part
        tuned = FrozenModel(ModelBundle(self.model, bundle.processor, "tiny"))
        self.model.requires_grad_(True)
        named = dict(self.model.named_parameters())
        tuned.trainable = lambda: named  # type: ignore[method-assign]
        tuned.param_groups = lambda config: [{"params": list(named.values())}]  # type: ignore[method-assign]
        options = SimpleNamespace(learning_rate=1e-3, weight_decay=0.0, betas=[0.9, 0.999])
        self.steps = TorchBackend(TorchConfig(device="cpu")).prepare({"policy": tuned}, None, options)
        assert bundle.template is not None
        self.batcher = Batcher(bundle.template, flat, flat, 60)
        self.groups = []
        for n, (ids, said) in enumerate(zip(prompts_of(), answers_of(), strict=True)):
            scored = []
            for choice, answer in enumerate(said):
                rollout = begin(Prompt(n, ids, {}), choice)
                rollout.ids, rollout.own = [*ids, *answer], [False] * len(ids) + [True] * len(answer)
                rollout.logprobs, rollout.finish = [0.0] * len(answer), "stop" if answer[-1] == END else "length"
                scored.append(Scored(rollout))
            self.groups.append(Group(n, scored))

    @property
    def answers(self) -> list[Scored]:
        return [answer for group in self.groups for answer in group.answers]

    def logprobs(self) -> list[torch.Tensor]:
        found: dict[int, torch.Tensor] = {}
        heat = self.config.temperature
        for batch, answers in self.batcher.of([group.answers for group in self.groups]):
            values = self.steps.forward("policy", batch)
            for answer, own, entropies in zip(
                answers, by_answer(values.logprobs(heat), answers), by_answer(values.entropies(heat), answers), strict=True
            ):
                found[id(answer)], answer.entropies = own, entropies
        return [found[id(answer)] for answer in self.answers]

    def loss(self) -> float:
        """Fills `advantage`s and the parameters' gradients."""
        config = self.config
        weights = torch.tensor([1.0, 0.5])
        parts = rewards()
        scores = (parts * weights).nansum(-1).masked_fill(parts.isnan().all(-1), NAN)
        if config.kl and config.kl_in == "reward":
            gap = [float((old - reference).sum()) for old, reference in zip(*self.told, strict=True)]
            scores = scores - config.kl * torch.tensor(gap).view_as(scores)
        found = advantages(config.advantage, scores, parts, weights, config.whiten)
        for answer, advantage in zip(self.answers, found.flatten().tolist(), strict=True):
            answer.advantage = advantage
            answer.live = not (config.overlong == "filter" and answer.rollout.truncated)
        kept = [answer for answer in self.answers if answer.live]
        tokens = sum(answer.rollout.length for answer in kept)
        divisor = normaliser(config, len(self.answers), tokens, tokens)
        entropies = torch.cat([answer.entropies for answer in kept]) if config.entropy_share < 1 else None
        threshold = None if entropies is None else high_entropy(entropies, config.entropy_share)
        batches = list(self.batcher.of([[answer for answer in group.answers if answer.live] for group in self.groups]))
        assert len(batches) > 1  # what is summed over passes is to be the same
        members = {id(batch): answers for batch, answers in batches}

        def loss_fn(outputs: Any, batch: Any) -> torch.Tensor:
            given = tokens_of(outputs, batch, members[id(batch)], threshold)
            return policy_loss(outputs.logprobs(config.temperature), given, config).total * tokens / divisor

        return self.steps.forward_backward([batch for batch, _ in batches], loss_fn).loss


def compare(trainer: Any, ours: Ours, vary: bool) -> None:
    """Advantages, loss and every gradient to 1e-5. vary: old and reference log-probabilities are others than the model's."""
    given = trainer._generate_and_score_completions([{"prompt": "a"}] * (PROMPTS * ANSWERS))
    own = ours.logprobs()
    if vary:
        old, reference = [noise(v, 7 + n) for n, v in enumerate(own)], [noise(v, 99 + n) for n, v in enumerate(own)]
        for name, values in (("old_per_token_logps", old), ("ref_per_token_logps", reference)):
            padded = torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
            if name != "old_per_token_logps" or not trainer.use_vllm:
                given[name] = padded
        if "old_logps" in given:
            given["old_logps"] = torch.stack([v.sum() for v in old])
        for answer, a, b in zip(ours.answers, old, reference, strict=True):
            answer.old, answer.reference = a, b
    if trainer.use_vllm:
        for answer, v, drawn in zip(ours.answers, own, sampled(), strict=True):
            answer.old, answer.rollout.logprobs = v, drawn
    expected = trainer._compute_loss(trainer.model, given)
    expected.backward()
    found = ours.loss()
    assert torch.allclose(torch.tensor([a.advantage for a in ours.answers]), given["advantages"], atol=1e-5)
    assert found == pytest.approx(float(expected.detach()), abs=1e-5)
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    assert len(gradients) > 10
    assert max(float(g.abs().max()) for g in gradients.values()) > 1e-4
    for name, parameter in ours.model.named_parameters():
        assert torch.allclose(parameter.grad, gradients[name], atol=1e-5), name


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({"loss_type": "grpo"}, {}),
    "batch-normalised": ({"loss_type": "grpo", "scale_rewards": "batch"}, {"advantage": "batch"}),
    "bnpo": ({"loss_type": "bnpo"}, {"loss": "bnpo"}),
    "dr_grpo": ({"loss_type": "dr_grpo", "scale_rewards": "none"}, {"loss": "dr_grpo", "advantage": "none"}),
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, {"loss": "dapo", "clip_high": 0.28}),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.3}, {"loss": "cispo", "clip_high": 1.3}),
    "sapo": ({"loss_type": "sapo"}, {"loss": "sapo"}),
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.08},
        {"ratio": "sequence", "clip_low": 0.05, "clip_high": 0.08},
    ),
    "gspo with dapo's sum": (
        {"loss_type": "dapo", "importance_sampling_level": "sequence"}, {"loss": "dapo", "ratio": "sequence"}
    ),
    "two-sided clipping": ({"loss_type": "grpo", "delta": 1.4}, {"delta": 1.4}),
    "kl": ({"loss_type": "grpo", "beta": 0.3}, {"kl": 0.3}),
    "kl unweighed": ({"beta": 0.3, "use_bias_correction_kl": False}, {"kl": 0.3, "kl_unbiased": False, "loss": "dapo"}),
    "kl of tokens": ({"loss_type": "dapo", "beta": 0.3}, {"loss": "dapo", "kl": 0.3}),
    "overlong filtering": ({"loss_type": "dapo", "mask_truncated_completions": True}, {"loss": "dapo", "overlong": "filter"}),
    "overlong of means": ({"loss_type": "grpo", "mask_truncated_completions": True}, {"overlong": "filter"}),
    "high entropy": ({"loss_type": "dapo", "top_entropy_quantile": 0.4}, {"loss": "dapo", "entropy_share": 0.4}),
    "another temperature": ({"loss_type": "grpo", "temperature": 0.7}, {"temperature": 0.7}),
    "high entropy at a temperature": (
        {"loss_type": "dapo", "top_entropy_quantile": 0.4, "temperature": 1.6},
        {"loss": "dapo", "entropy_share": 0.4, "temperature": 1.6},
    ),
    "gdpo": ({"loss_type": "grpo", "multi_objective_aggregation": "normalize_then_sum"}, {"advantage": "gdpo"}),
}  # fmt: skip


@pytest.fixture
def bundle(tiny_bundle: ModelBundle) -> ModelBundle:
    return tiny_bundle


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "vary", [pytest.param(False, marks=pytest.mark.slow, id="first update"), pytest.param(True, id="later update")]
)
def test_losses_gradients_and_advantages_are_trls(name: str, vary: bool, bundle: ModelBundle, tmp_path: Path) -> None:
    theirs, ours = CASES[name]
    if not vary and "kl" in ours:
        pytest.skip("the reference's own pass is compared in the runs' tests")
    trainer = trl_trainer(bundle, tmp_path, reward_weights=[1.0, 0.5], **{"beta": 0.0} | theirs)
    compare(trainer, Ours(bundle, GrpoConfig(max_tokens=MOST, **ours)), vary)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_corrections_of_the_mismatch_are_trls(mode: str, bundle: ModelBundle, tmp_path: Path) -> None:
    level, kind = mode.split("_")
    trainer = trl_trainer(
        bundle, tmp_path, reward_weights=[1.0, 0.5], beta=0.0, vllm_importance_sampling_mode=mode, loss_type="dapo",
        vllm_importance_sampling_clip_max=1.2, vllm_importance_sampling_clip_min=0.8,
    )  # fmt: skip
    trainer.use_vllm = True
    options = {"mismatch": kind, "mismatch_level": {"token": "token", "sequence": "answer"}[level], "loss": "dapo"}
    compare(trainer, Ours(bundle, GrpoConfig(max_tokens=MOST, mismatch_cap=1.2, mismatch_floor=0.8, **options)), False)


@pytest.mark.parametrize("vary", [False, True], ids=["first update", "later update"])
@pytest.mark.parametrize("normalise", [False, True])
def test_rloo_is_trls(normalise: bool, vary: bool, bundle: ModelBundle, tmp_path: Path) -> None:
    """Its ratio of whole answers, its baseline, and the divergence taken from rewards: the policy was moved away from its
    reference."""
    trainer = trl_trainer(
        bundle, tmp_path, "rloo", reward_weights=[1.0, 0.5], beta=0.2, normalize_advantages=normalise, epsilon=0.2
    )
    ours = Ours(bundle, GrpoConfig(max_tokens=MOST, advantage="rloo", ratio="answer", kl=0.2, kl_in="reward", whiten=normalise))
    for model in (trainer.model, ours.model):
        with torch.no_grad():
            model.model.norm.weight.mul_(1.3)
    ours.told = ours.logprobs(), Ours(bundle, ours.config).logprobs()
    compare(trainer, ours, vary)


def test_padded_and_flat_give_the_same(bundle: ModelBundle) -> None:
    """Loss and gradients of answers laid end to end, prompts shared, against padded ones."""
    found = []
    for flat in (True, False):
        ours = Ours(bundle, GrpoConfig(max_tokens=MOST, ratio="sequence_token", kl=0.1), flat)
        for n, (answer, own) in enumerate(zip(ours.answers, ours.logprobs(), strict=True)):
            answer.old, answer.reference = noise(own, 7 + n), noise(own, 99 + n)
        found.append((ours.loss(), [p.grad for p in ours.model.parameters()]))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found[0][1], found[1][1], strict=True))
