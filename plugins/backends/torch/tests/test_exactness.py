"""Flat, packed, accumulated and chunked passes give the loss and the gradients of plain rows, one at a time, in float64.

On tiny models of several architectures: Llama, Qwen3, Gemma-3 with its sliding window; and a state-space model, which mixes
what is laid end to end, and is found out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from swift_core.source import SampleList
from swift_core.types import Batch, Sample
from swift_plugin_supervised.isolation import isolates, shares
from swift_plugin_supervised.loop import cross_entropy
from swift_plugin_torch.backend import TorchBackend
from swift_plugin_torch.config import TorchConfig
from swift_plugin_torch.head import Forward, LabelLogprobs, Outputs
from swift_plugin_transformers.attention import NAME, install
from swift_plugin_transformers.collation import collate, pack

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 97, "max_position_embeddings": 512, "pad_token_id": 0, "head_dim": 8,
}  # fmt: skip


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))


def tied_llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True))


def qwen3() -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SHAPE))


def gemma3() -> Any:
    config = transformers.Gemma3TextConfig(**{**SHAPE, "num_hidden_layers": 6}, sliding_window=16, query_pre_attn_scalar=8)
    return transformers.Gemma3ForCausalLM(config)


def gemma2() -> Any:
    """Caps its attention's scores and its logits: neither of our shortcuts may be taken."""
    config = transformers.Gemma2Config(**SHAPE, sliding_window=16, query_pre_attn_scalar=8)
    config.final_logit_softcapping, config.attn_logit_softcapping = 0.5, 1.0
    return transformers.Gemma2ForCausalLM(config)


def granite() -> Any:
    """Divides its logits by a constant."""
    return transformers.GraniteForCausalLM(transformers.GraniteConfig(**SHAPE, logits_scaling=8.0))


MODELS: list[Callable[[], Any]] = [llama, tied_llama, qwen3, gemma3, gemma2, granite]


@pytest.fixture(params=MODELS, ids=lambda make: make.__name__)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    made = request.param().eval()
    for name, parameter in made.named_parameters():
        torch.manual_seed(len(name))
        parameter.data.normal_(0, 0.2)
    return made


def make_samples(lengths: list[int]) -> list[Sample]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for row, length in enumerate(lengths):
        ids = torch.randint(3, 97, (length,), generator=generator).tolist()
        weights = (torch.randint(0, 3, (length,), generator=generator) / 2).tolist()
        found.append(Sample(ids, weights, row=row))
    return found


SAMPLES = make_samples([7, 40, 1, 23, 150, 2])


def reference(model: Any, samples: list[Sample]) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean loss and its gradients: each sample alone, in float64, with the library's eager attention."""
    model = copy.deepcopy(model).double()
    model.set_attn_implementation("eager")
    total, weight = torch.zeros((), dtype=torch.float64), 0.0
    for sample in samples:
        ids = torch.tensor([sample.input_ids])
        scores = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, :-1], -1)
        weights = torch.tensor(sample.weights[1:], dtype=torch.float64)
        total = total - (scores.gather(-1, ids[0, 1:, None])[:, 0] * weights).sum()
        weight += float(weights.sum())
    mean = total / weight
    mean.backward()
    return float(mean.detach()), {name: p.grad for name, p in model.named_parameters()}


class Tuned:
    """Every parameter is trained."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def trainable(self) -> dict[str, Any]:
        return dict(self.model.named_parameters())

    def param_groups(self, config: Any) -> list[dict[str, Any]]:
        return [{"params": list(self.model.parameters())}]

    def make_optimizer(self, groups: Any) -> None: ...


def steps_on(model: Any) -> Any:
    config = SimpleNamespace(learning_rate=1e-3, weight_decay=0.0, betas=[0.9, 0.999])
    backend = TorchBackend(TorchConfig(device="cpu", precision="fp32"))
    return backend.prepare({"policy": Tuned(model)}, None, config)  # type: ignore[dict-item]


WAYS: dict[str, Callable[[], Iterator[Batch]]] = {
    "padded": lambda: iter([collate(SAMPLES, 0)]),
    "flat": lambda: iter([collate([pack(SAMPLES)], 0)]),
    "two flat passes": lambda: iter([collate([pack(SAMPLES[:2])], 0), collate([pack(SAMPLES[2:])], 0)]),
    "one by one": lambda: (collate([sample], 0) for sample in SAMPLES),
}


@pytest.mark.parametrize("way", WAYS)
def test_loss_and_gradients(model: Any, way: str) -> None:
    loss, expected = reference(model, SAMPLES)
    install(model)
    steps = steps_on(model)
    result = steps.forward_backward(list(WAYS[way]()), cross_entropy)
    assert result.loss == pytest.approx(loss, abs=1e-5)
    for name, parameter in model.named_parameters():
        size = max(1.0, float(expected[name].abs().max()))
        assert float((parameter.grad - expected[name]).abs().max()) < 1e-5 * size, name


def alike(lengths: list[int]) -> list[Sample]:
    """Samples that all begin with the same 20 untrained tokens and go on with so many of their own, the first untrained."""
    beginning = make_samples([20])[0].input_ids
    own = make_samples(lengths)
    return [Sample([*beginning, *s.input_ids], [*[0.0] * 21, *s.weights[1:]], row=s.row) for s in own]


SHARED = alike([7, 40, 2, 23, 150])


@pytest.mark.parametrize("count", [2, 5])
def test_a_shared_beginning_is_computed_once(model: Any, count: int) -> None:
    samples = SHARED[:count]
    loss, expected = reference(model, samples)
    install(model)
    template = SimpleNamespace(pack=pack, collate=lambda samples: collate(samples, 0))
    steps = steps_on(model)
    if model.config._attn_implementation != NAME:
        assert not shares(steps, template, SampleList(samples))  # type: ignore[arg-type]
        return
    assert shares(steps, template, SampleList(samples))  # type: ignore[arg-type]
    batch = collate([pack(samples, share=True)], 0)
    assert batch.inputs["input_ids"].shape[1] == sum(len(s.input_ids) for s in samples) - 20 * (count - 1)
    assert batch.tokens == sum(len(s.input_ids) for s in samples)
    result = steps.forward_backward([batch], cross_entropy)
    assert result.loss == pytest.approx(loss, abs=1e-5)
    for name, parameter in model.named_parameters():
        size = max(1.0, float(expected[name].abs().max()))
        assert float((parameter.grad - expected[name]).abs().max()) < 1e-5 * size, name


OTHERS = [Sample([*range(60, 76), *s.input_ids[20:]], s.weights[4:], row=s.row) for s in alike([9, 30])]


def test_each_group_shares_its_own_beginning(model: Any) -> None:
    """A sample alone, three that share 20 tokens, two that share 16; the sums by sample too."""
    from swift_plugin_supervised.groups import group_batches, sums

    groups = [[SAMPLES[0]], SHARED[:3], OTHERS]
    samples = [sample for group in groups for sample in group]
    loss, expected = reference(model, samples)
    alone = [reference(model, [sample])[0] * sum(sample.weights[1:]) for sample in samples]
    install(model)
    template = SimpleNamespace(pack=pack, collate=lambda samples: collate(samples, 0))
    steps, ours = steps_on(model), model.config._attn_implementation == NAME
    found: list[float] = []

    def by_sample(outputs: Any, batch: Batch) -> torch.Tensor:
        values = sums(outputs.logprobs() * batch.weights[:, 1:][outputs.trained], outputs, batch, batch.targets)
        found.extend((-values).tolist())
        return -values.sum()

    batches = []
    for batch, members in group_batches(template, groups, True, ours, None):  # type: ignore[arg-type]
        batch.targets = sum(len(groups[n]) for n in members)
        batches.append(batch)
    assert [n for _, members in group_batches(template, groups, True, ours, 150) for n in members] == [0, 1, 2]  # type: ignore[arg-type]
    if ours:
        assert batches[0].inputs["input_ids"].shape[1] == sum(len(s.input_ids) for s in samples) - 2 * 20 - 16
        assert batches[0].tokens == sum(len(s.input_ids) for s in samples)
    result = steps.forward_backward(batches, by_sample)
    assert result.loss == pytest.approx(loss, abs=1e-5)
    assert found == pytest.approx(alone, abs=1e-3)
    for name, parameter in model.named_parameters():
        size = max(1.0, float(expected[name].abs().max()))
        assert float((parameter.grad - expected[name]).abs().max()) < 1e-5 * size, name


def test_logits_and_entropies_of_trained_positions(model: Any) -> None:
    install(model)
    outputs = steps_on(model).forward("policy", collate(SAMPLES, 0))
    whole = torch.log_softmax(outputs.logits[:, :-1][outputs.trained].double(), -1)
    assert torch.allclose(torch.log_softmax(outputs.trained_logits().double(), -1), whole, atol=1e-5)
    assert torch.allclose(outputs.entropies().double(), -(whole.exp() * whole).sum(-1), atol=1e-5)


def test_what_is_shared_ends_before_anything_that_is_predicted_from_it() -> None:
    assert [pack(SHARED[:2], share=share).shared for share in (False, True)] == [[], [0, 20, 20]]
    trained = [Sample(s.input_ids, [*s.weights[:20], 1.0, *s.weights[21:]]) for s in SHARED]
    assert pack([SHARED[0], trained[1]], share=True).shared == [
        0,
        19,
        19,
    ]  # token 20 is predicted from token 19: it stands in each
    assert (
        pack([SHARED[0], SHARED[0]], share=True).shared[1] == SHARED[0].weights.index(next(filter(None, SHARED[0].weights))) - 1
    )
    short = [Sample(s.input_ids[13:], s.weights[13:]) for s in SHARED]
    assert pack(short, share=True).shared == []  # 7 tokens: too few to gain by
    assert pack(SHARED[:1], share=True).shared == []


def test_a_state_space_model_shares_nothing() -> None:
    torch.manual_seed(0)
    config = transformers.MambaConfig(hidden_size=32, state_size=4, num_hidden_layers=2, vocab_size=97, pad_token_id=0)
    made = transformers.MambaForCausalLM(config)
    install(made)
    template = SimpleNamespace(pack=pack, collate=lambda samples: collate(samples, 0))
    assert not shares(steps_on(made), template, SampleList(SHARED))  # type: ignore[arg-type]


def test_flat_rows_go_through_our_attention_where_it_fits() -> None:
    for make in MODELS:
        made = make()
        install(made)
        assert (made.config._attn_implementation == NAME) == (make is not gemma2)


def test_models_are_found_to_isolate(model: Any) -> None:
    install(model)
    template = SimpleNamespace(pack=pack, collate=lambda samples: collate(samples, 0))
    assert isolates(steps_on(model), template, SampleList(SAMPLES)) is None  # type: ignore[arg-type]


def test_a_state_space_model_is_found_out() -> None:
    torch.manual_seed(0)
    config = transformers.MambaConfig(hidden_size=32, state_size=4, num_hidden_layers=2, vocab_size=97, pad_token_id=0)
    made = transformers.MambaForCausalLM(config)
    install(made)
    template = SimpleNamespace(pack=pack, collate=lambda samples: collate(samples, 0))
    lack = isolates(steps_on(made), template, SampleList(SAMPLES))  # type: ignore[arg-type]
    assert lack is not None
    assert lack.startswith(("this model lets samples laid end to end see each other", "this model does not take samples"))


@pytest.mark.parametrize("shared", [0, 40])
def test_a_long_document_and_a_window_take_other_paths_to_the_same_values(monkeypatch: pytest.MonkeyPatch, shared: int) -> None:
    from swift_plugin_transformers import attention

    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 300, 8, requires_grad=True) for heads in (4, 2, 2))
    lengths = [shared, 200 - shared, 100] if shared else [200, 100]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    keys = torch.tensor([0, shared, 200 + shared, 300 + 2 * shared]) if shared else None

    def run(**options: Any) -> list[torch.Tensor]:
        for tensor in (query, key, value):
            tensor.grad = None
        ways = {"cu_seq_lens_q": ends, "cu_seq_lens_k": keys}
        out, _ = attention.attend(SimpleNamespace(), query, key, value, None, scaling=0.4, **ways, **options)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        return [out.detach(), *(tensor.grad.clone() for tensor in (query, key, value))]  # type: ignore[union-attr]

    def by_hand(window: int) -> torch.Tensor:
        place = torch.arange(300) - torch.tensor([0] * 200 + [200 - shared] * 100)
        distance = place[:, None] - place[None]
        document = torch.tensor([0] * 200 + [1] * 100)
        together = (document[:, None] == document[None]) | (torch.arange(300) < shared)
        seen = (distance >= 0) & (distance < window) & together
        scores = query.detach() @ key.detach().repeat_interleave(2, 1).transpose(2, 3) * 0.4
        share = torch.softmax(scores.masked_fill(~seen, float("-inf")), -1)
        return (share @ value.detach().repeat_interleave(2, 1)).transpose(1, 2)

    blocks = run()
    assert torch.allclose(blocks[0], by_hand(1000), atol=1e-5)
    assert torch.allclose(run(sliding_window=50)[0], by_hand(50), atol=1e-5)
    monkeypatch.setattr(attention, "LONGEST", 10)
    for mine, theirs in zip(blocks, run(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4)
    with pytest.raises(NotImplementedError, match="knows no softcap"):
        run(softcap=2.0)


@pytest.mark.parametrize("trained", ["states", "all", "nothing"])
@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_chunked_logprobs_and_gradients(trained: str, chunk: int, temperature: float) -> None:
    """Against log_softmax over all logits, with a loss that is not linear in the log-probabilities."""
    generator = torch.Generator().manual_seed(0)
    states, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((10, 6), (17, 6), (17,)))
    labels = torch.randint(17, (10,), generator=generator)
    results = []
    for way in ("plain", "chunked"):
        inputs = [tensor.clone().requires_grad_(trained == "all" or (trained == "states" and tensor is states))
                  for tensor in (states, weight, bias)]  # fmt: skip
        if way == "plain":
            found = torch.log_softmax(torch.nn.functional.linear(*inputs) / temperature, -1).gather(1, labels[:, None])[:, 0]
        else:
            found = LabelLogprobs.apply(*inputs, labels, chunk, temperature)
        if trained != "nothing":
            (found.exp() * torch.linspace(1, 2, 10)).sum().backward()
        results.append([found.detach(), *(tensor.grad for tensor in inputs)])
    for plain, chunked in zip(*results, strict=True):
        assert (plain is None) == (chunked is None)
        assert plain is None or torch.allclose(plain, chunked, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("hidden", [32, 64, 72, 576])
def test_the_output_layer_is_taken_apart_in_every_precision_and_width(dtype: torch.dtype, hidden: int) -> None:
    config = transformers.LlamaConfig(**SHAPE | {"hidden_size": hidden, "num_hidden_layers": 1})
    assert Forward(transformers.LlamaForCausalLM(config).to(dtype)).head is not None


def test_the_output_layer_is_taken_apart_only_where_that_is_exact(model: Any) -> None:
    passes = Forward(model)
    capped = getattr(model.config, "final_logit_softcapping", None)
    assert (passes.head is None) == bool(capped)
    batch = collate(SAMPLES[:2], 0)
    with torch.no_grad():
        whole = model(**batch.inputs, use_cache=False).logits
        outputs = passes(batch.inputs, batch)
        assert isinstance(outputs, Outputs)
        assert torch.allclose(outputs.logits, whole, atol=1e-5)
        scores = torch.log_softmax(whole[:, :-1].float(), -1).gather(-1, batch.labels[:, 1:, None])[..., 0]
        assert torch.allclose(outputs.logprobs(), scores[batch.weights[:, 1:] != 0], atol=1e-5)
    assert model.get_output_embeddings() is (passes.head or model.lm_head)
