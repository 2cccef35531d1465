"""The arithmetic of a step against plain torch: gradients, AdamW, clipping, evaluation, and state that comes back exactly."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from swift_core.config import build_options
from swift_core.errors import RequestError, RunError
from swift_core.testing import BackendContract
from swift_core.types import Batch, ModelBundle, Sample
from swift_plugin_torch.backend import TorchBackend, choose_device, choose_precision
from swift_plugin_torch.config import TorchConfig
from swift_plugin_torch.steps import TorchSteps
from swift_plugin_transformers.config import TransformersConfig
from swift_plugin_transformers.loading import load_model, load_processor
from swift_plugin_transformers.testing import save_tiny
from transformers import LlamaForCausalLM

CONFIG = SimpleNamespace(learning_rate=1e-2, weight_decay=0.0, betas=[0.9, 0.999])


class TestTorchBackend(BackendContract):
    distribution, id, options = "swift-plugin-torch", "torch", {"device": "cpu"}


class Whole:
    """The smallest TunedModel: every parameter of a model is trained, or those whose name holds `only`."""

    def __init__(self, model: Any, only: str = "", groups: Callable[[Any], list[dict[str, Any]]] | None = None) -> None:
        self.model, self.groups, self.optimizer = model, groups, None
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(only in name)

    def trainable(self) -> dict[str, Any]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def param_groups(self, config: Any) -> list[dict[str, Any]]:
        return self.groups(self.model) if self.groups else [{"params": list(self.trainable().values())}]

    def make_optimizer(self, groups: list[dict[str, Any]]) -> Any:
        return self.optimizer(groups) if self.optimizer else None  # type: ignore[misc]

    def before_step(self, step: int) -> None: ...

    def after_step(self, step: int) -> None: ...

    def disabled(self) -> Any:
        return nullcontext()

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...

    def merge(self) -> Any: ...


def backend(**options: Any) -> TorchBackend:
    config = build_options(TorchConfig, {"device": "cpu", **options}, "backend.torch")
    assert config is not None
    return TorchBackend(config)


def prepare(model: Any, config: Any = CONFIG, optimizer: Any = None, **options: Any) -> TorchSteps:
    return backend(**options).prepare({"policy": Whole(model)}, optimizer, config)


def weighted_sum(outputs: Any, batch: Batch) -> torch.Tensor:
    """A LossFn: the sum of weight x -log p."""
    scores = torch.log_softmax(outputs.logits[:, :-1].float(), -1).gather(-1, batch.labels[:, 1:, None])[..., 0]
    return -(scores * batch.weights[:, 1:]).sum()


SAMPLES = [
    Sample([10, 20, 30, 40], [0.0, 0.0, 1.0, 1.0]),
    Sample([50, 60, 70, 80, 90, 100, 110], [0.0, 1.0, 0.5, 0.0, 2.0, 1.0, 1.0]),
    Sample([120, 130], [0.0, 1.0]),
]
WEIGHT = 2 + 5.5 + 1


def reference_gradients(model: Any, samples: list[Sample]) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean loss per unit of weight and its gradients, sample by sample, token by token, without padding."""
    model = copy.deepcopy(model).train()
    total, weight = torch.zeros(()), 0.0
    for sample in samples:
        logits = model(input_ids=torch.tensor([sample.input_ids])).logits[0]
        for position in range(1, len(sample.input_ids)):
            log_p = torch.log_softmax(logits[position - 1], -1)[sample.input_ids[position]]
            total = total - sample.weights[position] * log_p
            weight += sample.weights[position]
    mean = total / weight
    mean.backward()
    return float(mean.detach()), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("split", [[3], [1, 2], [2, 1], [1, 1, 1]])
def test_microbatches_give_the_gradients_of_plain_autograd(tiny_bundle: ModelBundle, split: list[int]) -> None:
    template: Any = tiny_bundle.template
    loss, expected = reference_gradients(tiny_bundle.model, SAMPLES)
    steps = prepare(tiny_bundle.model)
    rows = iter(SAMPLES)
    batches = [template.collate([next(rows) for _ in range(count)]) for count in split]
    result = steps.forward_backward(batches, weighted_sum)
    assert result.loss == pytest.approx(loss, abs=1e-6)
    assert (result.weight, result.tokens, result.trained_tokens) == (WEIGHT, 13, 2 + 5 + 1)
    for name, parameter in tiny_bundle.model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], atol=1e-6, rtol=1e-5), name


def test_a_step_without_weight_changes_nothing(tiny_bundle: ModelBundle) -> None:
    template: Any = tiny_bundle.template
    steps = prepare(tiny_bundle.model)
    result = steps.forward_backward([template.collate([Sample([5, 6], [0.0, 0.0])])], weighted_sum)
    assert (result.loss, result.weight, result.tokens) == (0.0, 0.0, 2)
    assert steps.optimizer_step(1e-2, 1.0) == 0.0


@pytest.mark.parametrize("clip", [None, 0.05])
def test_adamw_equals_torch(tiny_bundle: ModelBundle, clip: float | None) -> None:
    """Five steps with a changing rate, groups of other rates and decays: the weights of torch.optim.AdamW, unfused."""

    def groups(model: Any) -> list[dict[str, Any]]:
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim == 1]
        return [{"params": matrices, "lr_scale": 4.0}, {"params": vectors, "weight_decay": 0.0}]

    template: Any = tiny_bundle.template
    config = SimpleNamespace(learning_rate=1e-2, weight_decay=0.1, betas=[0.8, 0.95])
    other = copy.deepcopy(tiny_bundle.model).train()
    plain = [{"params": groups(other)[0]["params"], "weight_decay": 0.1}, {**groups(other)[1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(plain, lr=1.0, betas=(0.8, 0.95), eps=1e-8, fused=False, foreach=False)
    steps = backend().prepare({"policy": Whole(tiny_bundle.model, groups=groups)}, None, config)
    batch = template.collate(SAMPLES)
    for rate in (1e-3, 2e-3, 3e-3, 2e-3, 1e-3):
        steps.forward_backward([batch], weighted_sum)
        norm = steps.optimizer_step(rate, clip)

        optimizer.zero_grad()
        (weighted_sum(other(**batch.inputs), batch) / WEIGHT).backward()
        expected = math.sqrt(sum(float((p.grad**2).sum()) for p in other.parameters()))
        assert norm == pytest.approx(expected, rel=1e-4)
        if clip:
            assert expected > 10 * clip
            for parameter in other.parameters():
                parameter.grad *= clip / expected
        for group, scale in zip(optimizer.param_groups, (4.0, 1.0), strict=True):
            group["lr"] = rate * scale
        optimizer.step()
        assert all(p.grad is None for p in tiny_bundle.model.parameters())
    for (name, mine), theirs in zip(tiny_bundle.model.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=2e-6, rtol=0), name


def test_clipping_scales_the_whole_gradient(tiny_bundle: ModelBundle) -> None:
    """With plain gradient descent the update is the clipped gradient itself."""
    template: Any = tiny_bundle.template
    before = {name: p.detach().clone() for name, p in tiny_bundle.model.named_parameters()}
    _, gradients = reference_gradients(tiny_bundle.model, SAMPLES)
    norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients.values()))
    steps = prepare(tiny_bundle.model, optimizer=lambda groups, rate, decay: torch.optim.SGD(groups, lr=rate))
    steps.forward_backward([template.collate(SAMPLES)], weighted_sum)
    assert steps.optimizer_step(0.5, 0.1) == pytest.approx(norm, rel=1e-5)
    for name, parameter in tiny_bundle.model.named_parameters():
        expected = before[name] - 0.5 * gradients[name] * 0.1 / norm
        assert torch.allclose(parameter, expected, atol=1e-6, rtol=0), name


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_ends_the_run(tiny_bundle: ModelBundle, bad: float) -> None:
    template: Any = tiny_bundle.template
    before = copy.deepcopy(tiny_bundle.model.state_dict())
    steps = prepare(tiny_bundle.model)
    steps.forward_backward([template.collate(SAMPLES)], weighted_sum)
    tiny_bundle.model.model.norm.weight.grad[3] = bad
    with pytest.raises(RunError, match=rf"^the gradient is {bad}: lower trainer.learning_rate, or use backend.precision=fp32$"):
        steps.optimizer_step(1e-2, 1.0)
    after = tiny_bundle.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_evaluation_is_the_mean_over_tokens_and_leaves_no_gradient(tiny_bundle: ModelBundle) -> None:
    template: Any = tiny_bundle.template
    loss, _ = reference_gradients(tiny_bundle.model, SAMPLES)
    steps = prepare(tiny_bundle.model)
    result = steps.evaluate((template.collate([sample]) for sample in SAMPLES), weighted_sum)
    assert result.loss == pytest.approx(loss, abs=1e-6)
    assert (result.weight, result.tokens, result.trained_tokens) == (WEIGHT, 13, 8)
    assert all(p.grad is None for p in tiny_bundle.model.parameters())
    assert not tiny_bundle.model.training
    assert math.isnan(steps.evaluate([], weighted_sum).loss)


def test_forward_of_a_role(tiny_bundle: ModelBundle) -> None:
    template: Any = tiny_bundle.template
    frozen = copy.deepcopy(tiny_bundle.model)
    frozen.model.norm.weight.data *= 2
    steps = backend().prepare({"policy": Whole(tiny_bundle.model), "reference": Whole(frozen)}, None, CONFIG)
    batch = template.collate(SAMPLES)
    with torch.no_grad():
        expected = frozen.eval()(**batch.inputs).logits
    outputs = steps.forward("reference", batch)
    assert torch.equal(outputs.logits, expected)
    assert not outputs.logits.requires_grad
    weights = dict(steps.full_weights("reference"))
    assert torch.equal(weights["model.norm.weight"], frozen.model.norm.weight)
    assert len(weights) == len(frozen.state_dict())


def test_who_makes_the_optimizer(tiny_bundle: ModelBundle) -> None:
    """The part that the run names comes first, then the tuner's own, then AdamW."""

    def part(groups: Any, rate: float, decay: float) -> Any:
        assert (rate, decay) == (1e-2, 0.3)
        return torch.optim.RMSprop(groups, lr=rate)

    config = SimpleNamespace(learning_rate=1e-2, weight_decay=0.3, betas=[0.9, 0.999])
    policy = Whole(tiny_bundle.model)
    assert isinstance(backend().prepare({"policy": policy}, part, config).optimizer, torch.optim.RMSprop)
    policy.optimizer = lambda groups: torch.optim.Adagrad(groups)  # type: ignore[assignment]
    assert isinstance(backend().prepare({"policy": policy}, None, config).optimizer, torch.optim.Adagrad)
    assert isinstance(backend().prepare({"policy": policy}, part, config).optimizer, torch.optim.RMSprop)


def test_nothing_to_train_is_said(tiny_bundle: ModelBundle) -> None:
    with pytest.raises(RequestError, match="nothing is trained: the tuner leaves no parameter with a gradient"):
        backend().prepare({"policy": Whole(tiny_bundle.model, only="no such name")}, None, CONFIG)


# --- state ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def dropping(tmp_path: Path) -> Any:
    """A model whose training depends on the random generator: dropout in its attention."""
    return LlamaForCausalLM.from_pretrained(save_tiny(tmp_path / "dropping", attention_dropout=0.5))


def train(steps: TorchSteps, batch: Batch, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        losses.append(steps.forward_backward([batch], weighted_sum).loss)
        steps.optimizer_step(1e-2, 1.0)
    return losses


def test_saved_state_continues_bit_for_bit(dropping: Any, tiny_bundle: ModelBundle, tmp_path: Path) -> None:
    batch: Batch = tiny_bundle.template.collate(SAMPLES)  # type: ignore[union-attr]
    (tmp_path / "state").mkdir()
    start = copy.deepcopy(dropping)
    steps = prepare(dropping)
    steps.backend.seed(3)
    train(steps, batch, 3)
    steps.save(tmp_path / "state")
    assert {file.name for file in (tmp_path / "state").iterdir()} == {"optimizer.safetensors", "random-0.safetensors"}
    weights = copy.deepcopy(dropping.state_dict())
    expected = train(steps, batch, 3), random.random(), torch.rand(3).tolist()
    final = copy.deepcopy(dropping.state_dict())

    def resumed(load: bool) -> tuple[Any, ...]:
        start.load_state_dict(weights)
        fresh = prepare(start)
        fresh.backend.seed(99)
        random.random()
        if load:
            fresh.load(tmp_path / "state")
        return train(fresh, batch, 3), random.random(), torch.rand(3).tolist()

    assert resumed(load=True) == expected
    assert all(torch.equal(start.state_dict()[name], tensor) for name, tensor in final.items())
    assert resumed(load=False)[0] != expected[0]


def test_state_of_any_optimizer(tiny_bundle: ModelBundle, tmp_path: Path) -> None:
    """Tensors and plain numbers of an optimizer that is not torch's come back as they were."""

    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for number, parameter in enumerate(self.param_groups[0]["params"]):
                state = self.state[parameter]
                state["count"] = state.get("count", 0) + 1
                state["sum"] = state.get("sum", 0) + parameter.grad
                state["bits"] = torch.tensor([number], dtype=torch.uint8)

    def make(model: Any) -> TorchSteps:
        return prepare(model, optimizer=lambda groups, rate, decay: Counting(groups, lr=rate))

    steps = make(tiny_bundle.model)
    train(steps, tiny_bundle.template.collate(SAMPLES), 2)  # type: ignore[union-attr]
    steps.save(tmp_path)
    other = make(copy.deepcopy(tiny_bundle.model))
    other.load(tmp_path)
    for mine, theirs in zip(steps.parameters, other.parameters, strict=True):
        before, after = steps.optimizer.state[mine], other.optimizer.state[theirs]
        assert after["count"] == before["count"] == 2
        assert torch.equal(after["sum"], before["sum"])
        assert torch.equal(after["bits"], before["bits"])
        assert after["bits"].dtype == torch.uint8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_saved_state_continues_on_cuda(tiny_bundle: ModelBundle, tmp_path: Path) -> None:
    """Fused AdamW counts its steps on the device."""
    batch: Batch = tiny_bundle.template.collate(SAMPLES)  # type: ignore[union-attr]
    other = copy.deepcopy(tiny_bundle.model)
    steps = prepare(tiny_bundle.model, device="cuda", precision="fp32")
    train(steps, batch, 2)
    steps.save(tmp_path)
    other.load_state_dict(tiny_bundle.model.state_dict())
    resumed = prepare(other, device="cuda", precision="fp32")
    resumed.load(tmp_path)
    assert train(resumed, batch, 2) == train(steps, batch, 2)


def test_a_checkpoint_that_cannot_be_resumed(tiny_bundle: ModelBundle, tmp_path: Path) -> None:
    steps = prepare(tiny_bundle.model)
    message = rf"^checkpoint {tmp_path} cannot be resumed: "
    with pytest.raises(RequestError, match=message):
        steps.load(tmp_path)
    steps.save(tmp_path)
    steps.load(tmp_path)
    steps.backend.rank = 1  # of a run with more processes
    with pytest.raises(RequestError, match=message + ".*random-1.safetensors"):
        steps.load(tmp_path)
    steps.backend.rank = 0
    save_file(load_file(tmp_path / "random-0.safetensors"), tmp_path / "random-0.safetensors")  # without Python's generator
    with pytest.raises(RequestError, match=message):
        steps.load(tmp_path)


# --- devices and precision --------------------------------------------------------------------------------------------


def test_bf16_is_near_fp32_and_keeps_masters_in_fp32(tiny_folder: Path, tiny_bundle: ModelBundle) -> None:
    batch: Batch = tiny_bundle.template.collate(SAMPLES)  # type: ignore[union-attr]
    config = TransformersConfig()
    half = backend(precision="bf16")
    assert half.load_kwargs() == {"dtype": torch.bfloat16, "device": torch.device("cpu")}
    loaded = load_model(str(tiny_folder), load_processor(str(tiny_folder), config), half.load_kwargs(), config)
    steps = half.prepare({"policy": Whole(loaded.model, only="layers.1")}, None, CONFIG)
    types = {name: p.dtype for name, p in loaded.model.named_parameters()}
    assert set(types.values()) == {torch.bfloat16}  # computed in
    assert {master.dtype for master in steps.masters} == {torch.float32}
    full = backend().prepare({"policy": Whole(tiny_bundle.model, only="layers.1")}, None, CONFIG)
    mine, theirs = train(steps, batch, 3), train(full, batch, 3)
    assert mine != theirs
    assert mine == pytest.approx(theirs, rel=0.02)
    assert theirs[2] < theirs[0] - 0.1
    assert half.describe()["precision"] == "bf16"


def test_seed_reaches_torch_and_python() -> None:
    one = backend()
    one.seed(5)
    first = torch.rand(2).tolist(), random.random()
    one.seed(5)
    assert (torch.rand(2).tolist(), random.random()) == first


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", 0) == choose_device("cpu", 3) == torch.device("cpu")
    for name, index in (("cuda", 0), ("cuda:5", 5)):
        with pytest.raises(RequestError, match=rf"^backend.torch.device: '{name}' asks for GPU {index}, and 0 are available$"):
            choose_device(name, 0)
    for name in ("tpu", "gpu:0", "cuda:x", "mps"):
        with pytest.raises(
            RequestError, match=rf"^backend.torch.device: '{name}' is no device; use auto, cpu, cuda or cuda:N$"
        ):
            choose_device(name, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", 1) == choose_device("cuda", 1) == torch.device("cuda", 1)
    with pytest.raises(RequestError, match="asks for GPU 2, and 2 are available"):
        choose_device("cuda", 2)  # the third rank of a machine with two


def test_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert choose_precision("auto", cpu) == "fp32"
    assert choose_precision("bf16", cpu) == "bf16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert choose_precision("auto", cuda) == "bf16"
    assert choose_precision("fp32", cuda) == "fp32"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert choose_precision("auto", cuda) == "fp32"
    with pytest.raises(RequestError, match=r"^backend.torch.precision: this GPU has no bf16; use fp32$"):
        choose_precision("bf16", cuda)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"processes": 0}, "backend.torch: processes must be at least 1, not 0"),
        ({"threads": 0}, "backend.torch: threads must be at least 1, not 0"),
        ({"precision": "fp8"}, r"backend.torch.precision: expected one of auto, fp32, bf16, not 'fp8'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        backend(**options)


def test_threads_and_description() -> None:
    before = torch.get_num_threads()
    try:
        assert backend(threads=2).describe() == {
            "device": "cpu", "name": "cpu", "precision": "fp32", "processes": 1, "threads": 2, "torch": torch.__version__,
        }  # fmt: skip
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert backend().peak_bytes() > 100 * 2**20  # torch alone takes that


class Normed(torch.nn.Module):
    """A tower with running statistics before a trained layer, over ids in place of pictures; `prefix` positions stand before
    those of the text, as in GIT."""

    def __init__(self, prefix: int = 0) -> None:
        super().__init__()
        self.tower, self.norm, self.out = torch.nn.Embedding(256, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 256)
        self.prefix = prefix

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> SimpleNamespace:
        states = self.norm(self.tower(input_ids).transpose(1, 2)).transpose(1, 2)
        before = states.new_ones((len(input_ids), self.prefix, 8))
        return SimpleNamespace(logits=self.out(torch.cat([before, states], 1)))


@pytest.mark.parametrize("trained", ["out", "", "norm"])
def test_running_statistics_move_only_where_their_layer_is_trained(tiny_bundle: ModelBundle, trained: str) -> None:
    template: Any = tiny_bundle.template
    torch.manual_seed(0)
    model = Normed()
    start = model.norm.running_mean.clone()  # type: ignore[union-attr]
    steps = backend().prepare({"policy": Whole(model, trained)}, None, CONFIG)
    batch = template.collate(SAMPLES)
    told = steps.evaluate([batch], weighted_sum).loss
    loss = steps.forward_backward([batch], weighted_sum).loss
    assert torch.equal(model.norm.running_mean, start) == (trained == "out")
    assert (loss == told) == (trained == "out")  # frozen, they are in a training pass what they are in inference
    assert model.training
    assert model.out.training


def test_what_stands_before_the_text_has_no_labels(tiny_bundle: ModelBundle) -> None:
    template: Any = tiny_bundle.template
    found = []
    for prefix in (0, 5):
        torch.manual_seed(0)
        steps = prepare(Normed(prefix))
        found.append(steps.forward("policy", template.collate(SAMPLES)).logprobs())
    assert torch.equal(*found)
