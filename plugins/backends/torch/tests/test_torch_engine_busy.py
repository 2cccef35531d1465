"""The engine under load: requests that join and leave at random, mixed adapters, seeds, prompts kept, faults of one request."""

from __future__ import annotations

import copy
import json
import random
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from swift_core.errors import RequestError, RunError
from swift_core.types import Completion, Constraint, ModelBundle, Request
from swift_plugin_torch.config import TransformersEngineConfig
from swift_plugin_torch.engine import TransformersEngine
from swift_plugin_torch.rows import Call, Prompt, Row
from swift_plugin_torch.sampling import draw, restrict
from swift_plugin_torch.slots import joinable
from swift_plugin_torch.texts import Text

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 259, "max_position_embeddings": 512, "pad_token_id": 0, "head_dim": 8,
}  # fmt: skip
PROMPTS = [[10 + 3 * n + 7 * row for n in range(3 + row % 9)] for row in range(24)]


def engine(bundle: ModelBundle, **options: Any) -> TransformersEngine:
    return TransformersEngine(bundle, TransformersEngineConfig(**options))


def sharpened(bundle: ModelBundle) -> ModelBundle:
    """Weights large enough that no two tokens are nearly as likely."""
    for name, parameter in bundle.model.named_parameters():
        torch.manual_seed(len(name))
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.3)
    return bundle


def answers(made: Any, requests: list[Request]) -> list[Completion]:
    return sorted(made.generate(requests), key=lambda found: (found.index, found.choice))


def assert_greedy(model: Any, prompt: list[int], found: Completion) -> None:
    """Each token is the likeliest after those before it, but for ties within 1e-3; log-probabilities are the model's."""
    ids = torch.tensor([[*prompt, *found.token_ids]])
    with torch.no_grad():
        scores = torch.log_softmax(model(ids).logits[0, len(prompt) - 1 : -1].float(), -1)
    own = scores.gather(-1, torch.tensor(found.token_ids)[:, None])[:, 0]
    assert float((scores.amax(-1) - own).max()) < 1e-3
    assert found.logprobs == pytest.approx(own.tolist(), abs=1e-4)


def test_requests_join_and_leave_at_random(tiny_bundle: ModelBundle) -> None:
    bundle = sharpened(tiny_bundle)
    made = engine(bundle, batch_size=5, prefill_tokens=16)
    failures: list[BaseException] = []

    def talk(seed: int) -> None:
        chance = random.Random(seed)
        try:
            for _ in range(5):
                time.sleep(chance.random() / 100)
                prompts = [chance.choice(PROMPTS) for _ in range(chance.randint(1, 3))]
                requests = [Request(token_ids=prompt, max_tokens=chance.randint(1, 20)) for prompt in prompts]
                if chance.random() < 0.3:  # one goes away early
                    stream: Any = made.generate(requests, stream=True)
                    next(stream)
                    stream.close()
                    continue
                for found in made.generate(requests):
                    asked = requests[found.index]
                    assert len(found.token_ids) == asked.max_tokens or found.finish == "stop"
                    assert_greedy(bundle.model, asked.token_ids or [], found)
        except BaseException as err:
            failures.append(err)

    threads = [threading.Thread(target=talk, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    for _ in range(300):
        if made._start()[1].load() == (0, 0):
            break
        time.sleep(0.01)
    assert made._start()[1].load() == (0, 0)  # what was cancelled holds no slot
    assert made._start()[0].slots is not None
    made.close()
    assert "swift-engine" not in [thread.name for thread in threading.enumerate()]


def test_greedy_is_what_generate_says(tiny_bundle: ModelBundle) -> None:
    bundle = sharpened(tiny_bundle)
    found = answers(engine(bundle), [Request(token_ids=prompt, max_tokens=16, ignore_eos=True) for prompt in PROMPTS])
    for prompt, completion in zip(PROMPTS, found, strict=True):
        plain = bundle.model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=2**31 - 1)
        if plain[0, len(prompt) :].tolist() != completion.token_ids:
            assert_greedy(bundle.model, prompt, completion)  # only near ties


def windowed() -> Any:
    config = transformers.Gemma3TextConfig(**{**SHAPE, "num_hidden_layers": 6}, sliding_window=8, query_pre_attn_scalar=8)
    return transformers.Gemma3ForCausalLM(config)


def mistral() -> Any:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**SHAPE, sliding_window=8))


def mamba() -> Any:
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=259, state_size=4)
    )


def bloom() -> Any:
    return transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=259, hidden_size=32, n_layer=2, n_head=4))


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=64))


@pytest.mark.parametrize(("make", "joins"), [(windowed, True), (mistral, True), (mamba, False), (bloom, False), (gpt2, True)])
def test_every_kind_of_cache(make: Any, joins: bool, tiny_bundle: ModelBundle) -> None:
    """Sliding windows are exact; where a cache cannot be shared, rows go through the model's own generate."""
    torch.manual_seed(3)
    model = make().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.2)
    assert joinable(model) is joins
    made = engine(replace(tiny_bundle, model=model), batch_size=4)
    requests = [Request(token_ids=prompt, max_tokens=14, ignore_eos=True) for prompt in PROMPTS[:9]]
    for completion in answers(made, requests):
        assert_greedy(model, PROMPTS[completion.index], completion)
        assert (len(completion.token_ids), completion.finish) == (14, "length")
    mixed = [replace(requests[0], max_tokens=3), replace(requests[1], temperature=1.0, seed=3, n=2), requests[2]]
    found = answers(made, mixed)
    assert [len(completion.token_ids) for completion in found] == [3, 14, 14, 14]
    alone = answers(made, [mixed[1]])
    assert [completion.token_ids for completion in found[1:3]] == [completion.token_ids for completion in alone]
    pieces = [piece for piece in made.generate(requests[:2], stream=True) if piece.finish is None]
    assert sum(len(piece.token_ids) for piece in pieces) == 28


def test_a_seed_does_not_see_its_neighbours(tiny_bundle: ModelBundle) -> None:
    made = engine(sharpened(tiny_bundle))
    asked = Request(token_ids=PROMPTS[4], max_tokens=24, temperature=1.2, top_p=0.9, seed=11, n=3)
    alone = answers(made, [asked])
    others = [Request(token_ids=prompt, max_tokens=9, temperature=0.7, top_k=7) for prompt in PROMPTS]
    busy = [found for found in answers(made, [*others, asked]) if found.index == len(others)]
    assert [found.token_ids for found in alone] == [found.token_ids for found in busy]
    assert len({tuple(found.token_ids) for found in alone}) == 3


def row(request: Request, seed: int = 0) -> Row:
    text = Text(lambda ids: "")
    return Row(Call(False), 0, 0, request, Prompt([1]), None, frozenset(), text, random.Random(seed))


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), [(0, 1, 0), (5, 1, 0), (0, 0.7, 0), (0, 1, 0.1), (20, 0.8, 0.05), (0, 0.999, 0)]
)
def test_draws_follow_a_direct_reference(top_k: int, top_p: float, min_p: float) -> None:
    """Against the library's own warpers: which tokens are left, and how often each is drawn."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(1, 600)
    warped = logits / 0.8
    ids = torch.zeros(1, 1, dtype=torch.long)
    if top_k:
        warped = transformers.TopKLogitsWarper(top_k)(ids, warped)
    if top_p < 1:
        warped = transformers.TopPLogitsWarper(top_p)(ids, warped)
    if min_p:
        warped = transformers.MinPLogitsWarper(min_p)(ids, warped)
    expected = torch.softmax(warped, -1)[0]
    shares = torch.softmax(logits / 0.8, -1)[0]
    restrict(shares, top_k, top_p, min_p)
    assert torch.equal(shares > 0, expected > 0)
    assert torch.allclose(shares / shares.sum(), expected, atol=1e-6)
    request, count = Request(temperature=0.8, top_k=top_k, top_p=top_p, min_p=min_p), 4000
    drawn = draw(logits.repeat(count, 1), [row(request, n) for n in range(count)])
    found = torch.bincount(torch.tensor(drawn), minlength=600) / count
    assert float(found[expected == 0].sum()) == 0
    assert float((found - expected).abs().sum()) / 2 < 0.1


def test_penalties_and_bias(tiny_bundle: ModelBundle) -> None:
    """Repetition as transformers' processor does it; presence, frequency, bias and min_tokens by their definitions."""
    bundle = sharpened(tiny_bundle)
    made, prompt = engine(bundle), PROMPTS[5]
    asked = Request(token_ids=prompt, max_tokens=12, ignore_eos=True)
    plain = bundle.model.generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, repetition_penalty=1.7, eos_token_id=2**31 - 1
    )
    (found,) = answers(made, [replace(asked, repetition_penalty=1.7)])
    assert found.token_ids == plain[0, len(prompt) :].tolist()
    (found,) = answers(made, [replace(asked, presence_penalty=1.5, frequency_penalty=0.75, logit_bias={40: 4.0, 41: -100.0})])
    ids: list[int] = []
    for _ in range(12):
        with torch.no_grad():
            logits = bundle.model(torch.tensor([[*prompt, *ids]])).logits[0, -1]
        logits[40] += 4.0
        logits[41] -= 100.0
        for token in set(ids):
            logits[token] -= 1.5 + 0.75 * ids.count(token)
        ids.append(int(logits.argmax()))
    assert found.token_ids == ids
    first = answers(made, [asked])[0].token_ids[0]
    (found,) = answers(made, [replace(asked, stop_ids=[first], min_tokens=4)])
    assert first not in found.token_ids[:4]
    assert answers(made, [replace(asked, stop_ids=[first])])[0].token_ids == [first]
    (found,) = answers(made, [replace(asked, max_tokens=1, top_logprobs=3)])
    with torch.no_grad():
        values, best = torch.log_softmax(bundle.model(torch.tensor([prompt])).logits[0, -1], -1).topk(3)
    assert [token for token, _ in found.top_logprobs[0]] == best.tolist()
    assert [score for _, score in found.top_logprobs[0]] == pytest.approx(values.tolist(), abs=1e-4)


# --- constraints ------------------------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["tea", "jam"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["name", "count"], "additionalProperties": False,
}  # fmt: skip


def test_constrained_answers_parse(tiny_bundle: ModelBundle) -> None:
    made = engine(tiny_bundle)
    asked = Request(token_ids=[5, 6], max_tokens=80, temperature=1.0, constraint=Constraint("json_schema", SCHEMA))
    for found in answers(made, [replace(asked, seed=seed) for seed in range(40)]):
        assert found.finish == "stop" or len(found.token_ids) == 80
        if found.finish == "stop":
            value = json.loads(found.text)
            assert value["name"] in ("tea", "jam")
            assert value["count"] in range(10)
    for constraint, allowed in (
        (Constraint("choice", ["yes", "no", "maybe"]), {"yes", "no", "maybe"}),
        (Constraint("regex", "[ab]{3}"), {a + b + c for a in "ab" for b in "ab" for c in "ab"}),
        (Constraint("grammar", 'start: "x" ("y" | "z")'), {"xy", "xz"}),
    ):
        texts = [(f.text, f.finish) for f in answers(made, [replace(asked, constraint=constraint, seed=n) for n in range(12)])]
        assert {finish for _, finish in texts} == {"stop"}
        assert {text for text, _ in texts} <= allowed
        assert len({text for text, _ in texts}) > 1
    (cut,) = answers(made, [replace(asked, constraint=Constraint("regex", "a{20}"), max_tokens=7)])
    assert (cut.text, cut.finish) == ("a" * 7, "length")


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint("regex", "(["), Constraint("choice", []), Constraint("json_schema", 7),
        Constraint("grammar", "start: nothing"), Constraint("json_schema", {"type": "nonsense"}),
        Constraint("json_schema", {"type": "integer", "minimum": 3, "maximum": 1}),
    ],
)  # fmt: skip
def test_a_bad_constraint_is_one_line(tiny_bundle: ModelBundle, constraint: Constraint) -> None:
    with pytest.raises(RequestError, match=f"^constraint {constraint.kind}: ") as caught:
        list(engine(tiny_bundle).generate([Request(token_ids=[5], constraint=constraint)]))
    assert "\n" not in str(caught.value)


# --- adapters ---------------------------------------------------------------------------------------------------------


def save_adapter(bundle: ModelBundle, folder: Path, seed: int, **options: Any) -> Any:
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=4, lora_alpha=32, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", **options
    )
    model = peft.get_peft_model(copy.deepcopy(bundle.model), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return model.merge_and_unload().eval()


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_swap_and_none_is_wrong(tiny_bundle: ModelBundle, tmp_path: Path, dora: bool) -> None:
    """Mixed in one step where peft can (LoRA), else in steps of their own (DoRA)."""
    bundle, names = sharpened(tiny_bundle), ["a", "b", "c", "d"]
    models: dict[str | None, Any] = {None: copy.deepcopy(bundle.model)}
    made = engine(bundle, batch_size=8)
    for seed, name in enumerate(names):
        models[name] = save_adapter(bundle, tmp_path / name, seed, use_dora=dora)
    for name in names:
        made.load_adapter(name, tmp_path / name)
    chance = random.Random(0)
    requests = [
        Request(token_ids=chance.choice(PROMPTS), max_tokens=chance.randint(1, 6), adapter=chance.choice([None, *names]))
        for _ in range(60 if dora else 500)
    ]
    for found in made.generate(requests):
        asked = requests[found.index]
        assert_greedy(models[asked.adapter], asked.token_ids or [], found)


def test_an_adapter_is_unloaded_after_its_requests(tiny_bundle: ModelBundle, tmp_path: Path) -> None:
    save_adapter(tiny_bundle, tmp_path / "a", 1)
    made = engine(tiny_bundle)
    made.load_adapter("a", tmp_path / "a")
    stream: Any = made.generate([Request(token_ids=[5], max_tokens=60, ignore_eos=True, adapter="a")], stream=True)
    next(stream)
    made.unload_adapter("a")
    *_, last = stream
    assert len(last.token_ids) == 60
    with pytest.raises(RequestError, match="adapter 'a' is not loaded; loaded: none"):
        list(made.generate([Request(token_ids=[5], adapter="a")]))


# --- prompts kept, weights, faults --------------------------------------------------------------------------------------


def test_a_prompt_that_begins_alike_is_not_read_again(tiny_bundle: ModelBundle, tmp_path: Path) -> None:
    bundle = sharpened(tiny_bundle)
    save_adapter(bundle, tmp_path / "a", 1)
    made = engine(bundle)
    shared = [(7 * n) % 200 + 5 for n in range(150)]
    requests = [Request(token_ids=[*shared, 9 + n], max_tokens=8, ignore_eos=True) for n in range(3)]
    first, second, third = (answers(made, [request])[0] for request in requests)
    assert (first.cached_tokens, second.cached_tokens, third.cached_tokens) == (0, 150, 150)
    for found, request in zip((first, second, third), requests, strict=True):
        assert_greedy(bundle.model, request.token_ids or [], found)
    base = copy.deepcopy(bundle.model)
    made.load_adapter("a", tmp_path / "a")
    assert answers(made, [replace(requests[0], adapter="a")])[0].cached_tokens == 0
    made.sync_weights(iter(()), version=2)
    (again,) = answers(made, [requests[0]])
    assert (again.cached_tokens, again.weight_version) == (0, 2)
    assert_greedy(base, requests[0].token_ids or [], again)
    runner = made._start()[0]
    assert 0 < runner.prefixes.bytes <= 256 << 20
    small = engine(replace(bundle, model=base), prefix_mib=0)
    assert [answers(small, [request])[0].cached_tokens for request in requests] == [0, 0, 0]


def test_one_bad_request_leaves_others_alone(tiny_bundle: ModelBundle, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def change(ids, logits):\n    if ids[0] == 99:\n        raise ValueError('no 99')\n"
        "    logits[77] += 1000\n    return logits\n"
    )
    made = engine(tiny_bundle, processors=[f"{tmp_path / 'mine.py'}:change"])
    good = made.generate([Request(token_ids=[5], max_tokens=30, ignore_eos=True)], stream=True)
    next(good)
    with pytest.raises(RunError, match="no 99"):
        list(made.generate([Request(token_ids=[99], max_tokens=3)]))
    *_, last = good
    assert last.token_ids == [77] * 30
    with pytest.raises(RequestError, match=r"^engine.processors: .*no function 'other'"):
        engine(tiny_bundle, processors=[f"{tmp_path / 'mine.py'}:other"])


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_tokens", 0), ("n", 0), ("temperature", -1.0), ("top_p", 1.5), ("min_p", -0.1), ("top_k", -1),
     ("repetition_penalty", 0.0), ("logit_bias", {999999: 1.0}), ("stop_ids", [-1]), ("token_ids", []),
     ("token_ids", [5] * 100_000)],
)  # fmt: skip
def test_values_outside_their_range(tiny_bundle: ModelBundle, field: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        list(engine(tiny_bundle).generate([replace(Request(token_ids=[5]), **{field: value})]))
    assert "\n" not in str(caught.value)


def test_closed_and_asleep(tiny_bundle: ModelBundle) -> None:
    made = engine(tiny_bundle)
    stream: Any = made.generate([Request(token_ids=[5], max_tokens=200, ignore_eos=True)], stream=True)
    next(stream)
    made.close()
    with pytest.raises(RunError, match="closed"):
        list(stream)
    with pytest.raises(RequestError, match="closed"):
        list(made.generate([Request(token_ids=[5])]))
    assert made._runner is not None
    assert made._runner.slots is not None
    assert made._runner.slots.bytes() == made._runner.prefixes.bytes == 0
