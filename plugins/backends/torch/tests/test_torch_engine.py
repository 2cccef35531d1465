"""The engine against plain loops over the model's logits: tokens, log-probabilities, streams, sampling and adapters."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from swift_core.errors import CapabilityError, RequestError, RunError
from swift_core.testing import EngineContract
from swift_core.types import Completion, ModelBundle, Request, Sample
from swift_plugin_full.config import FullConfig
from swift_plugin_full.tuner import FullTuned
from swift_plugin_torch.backend import TorchBackend
from swift_plugin_torch.config import TorchConfig, TransformersEngineConfig
from swift_plugin_torch.engine import TransformersEngine
from swift_plugin_transformers import attention


class TestTransformersEngine(EngineContract):
    distribution, id = "swift-plugin-torch", "transformers"


PROMPTS = [[10, 20, 30], [40], [50, 60, 70, 80, 90, 100, 110], [120, 130]]


def engine(bundle: ModelBundle, batch_size: int = 8) -> TransformersEngine:
    return TransformersEngine(bundle, TransformersEngineConfig(batch_size))


def run(made: Any, requests: list[Request]) -> list[Completion]:
    """Completions in the order of the requests."""
    found = sorted(made.generate(requests), key=lambda completion: completion.index)
    assert [completion.index for completion in found] == list(range(len(requests)))
    return found


def greedy(model: Any, prompt: list[int], count: int, stops: tuple[int, ...] = (2,)) -> tuple[list[int], list[float]]:
    """Greedy continuation by a whole forward pass for each token, and its log-probabilities."""
    ids, scores = list(prompt), []
    for _ in range(count):
        with torch.no_grad():
            logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], -1)
        ids.append(int(logprobs.argmax()))
        scores.append(float(logprobs.max()))
        if ids[-1] in stops:
            break
    return ids[len(prompt) :], scores


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batched_greedy_is_greedy_one_by_one(tiny_bundle: ModelBundle, batch_size: int) -> None:
    expected = [greedy(tiny_bundle.model, prompt, 12) for prompt in PROMPTS]
    found = run(engine(tiny_bundle, batch_size), [Request(token_ids=prompt, max_tokens=12) for prompt in PROMPTS])
    for completion, prompt, (ids, scores) in zip(found, PROMPTS, expected, strict=True):
        assert completion.token_ids == ids
        assert completion.logprobs == pytest.approx(scores, abs=1e-5)
        assert completion.text == tiny_bundle.processor.decode(ids, skip_special_tokens=True)
        assert (completion.finish, completion.prompt_tokens, completion.weight_version) == ("length", len(prompt), 0)
        reference = tiny_bundle.model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
        assert reference[0, len(prompt) :].tolist() == ids


def test_a_turn_ends_at_a_stop_token(tiny_bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that end early are padded while others go on; nothing of the padding is in their completion."""
    stop = greedy(tiny_bundle.model, PROMPTS[0], 4)[0][3]
    monkeypatch.setattr(tiny_bundle.template, "stop_ids", lambda: [stop])
    found = run(engine(tiny_bundle), [Request(token_ids=prompt, max_tokens=30) for prompt in PROMPTS])
    assert found[0].finish == "stop"
    assert len(found[0].token_ids) <= 4
    for completion, prompt in zip(found, PROMPTS, strict=True):
        ids, scores = greedy(tiny_bundle.model, prompt, 30, (stop,))
        assert completion.token_ids == ids
        assert completion.logprobs == pytest.approx(scores, abs=1e-5)
        assert completion.finish == ("stop" if ids[-1] == stop else "length")


def test_messages_are_rendered_by_the_template(tiny_bundle: ModelBundle) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = tiny_bundle.processor(text)["input_ids"]
    by_text, by_ids = run(engine(tiny_bundle), [Request(messages, max_tokens=6), Request(token_ids=ids, max_tokens=6)])
    assert by_text == replace(by_ids, index=0)
    assert by_text.prompt_tokens == len(ids)


def test_requests_of_different_settings_are_not_mixed(tiny_bundle: ModelBundle) -> None:
    lengths = [3, 9, 3, 5]
    requests = [Request(token_ids=prompt, max_tokens=n) for prompt, n in zip(PROMPTS, lengths, strict=True)]
    found = run(engine(tiny_bundle), requests)
    assert [len(completion.token_ids) for completion in found] == lengths
    penalised = run(engine(tiny_bundle), [*requests[:1], Request(token_ids=PROMPTS[0], max_tokens=9, repetition_penalty=5.0)])
    expected = tiny_bundle.model.generate(
        torch.tensor([PROMPTS[0]]), max_new_tokens=9, do_sample=False, repetition_penalty=5.0
    )[0, 3:].tolist()
    assert penalised[1].token_ids == expected != greedy(tiny_bundle.model, PROMPTS[0], 9)[0]


def speaking(bundle: ModelBundle, ids: list[int]) -> ModelBundle:
    """The bundle with a model that says `ids` over and over, whatever it is asked."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        outputs = original(*args, **kwargs)
        cache = outputs.past_key_values
        done = cache.get_seq_length() - 1 if cache is not None else 0
        outputs.logits = torch.full_like(outputs.logits, -9.0)
        outputs.logits[:, -1, ids[done % len(ids)]] = 9.0
        return outputs

    original = bundle.model.forward
    bundle.model.forward = forward
    return bundle


def said(bundle: ModelBundle, text: str) -> ModelBundle:
    ids = bundle.processor(text)["input_ids"]
    return speaking(bundle, ids)


def pieces_of(made: Any, request: Request) -> tuple[list[str], Completion]:
    """The pieces of a stream, and its last completion."""
    *pieces, last = made.generate([request], stream=True)
    assert all(piece.finish is None for piece in pieces)
    assert last.finish is not None
    for name in ("token_ids", "logprobs", "top_logprobs"):
        assert [value for piece in pieces for value in getattr(piece, name)] == getattr(last, name)
    return [piece.text for piece in pieces], last


def test_stream_tells_what_generate_tells(tiny_bundle: ModelBundle) -> None:
    made = engine(tiny_bundle)
    requests = [Request(token_ids=prompt, max_tokens=24) for prompt in PROMPTS]
    whole = run(made, requests)
    streamed = [piece for piece in made.generate(requests, stream=True) if piece.finish]
    for one, other in zip(whole, streamed, strict=True):
        assert one == other


def test_a_character_of_several_tokens_is_streamed_whole(tiny_bundle: ModelBundle) -> None:
    """A token of the byte-level tokenizer is a byte: a fox takes four."""
    bundle = said(tiny_bundle, "aé🦊!")
    pieces, last = pieces_of(engine(bundle), Request(token_ids=[5], max_tokens=8))
    assert pieces == ["a", "é", "🦊", "!"]
    assert (last.text, len(last.token_ids)) == ("aé🦊!", 8)
    pieces, last = pieces_of(engine(bundle), Request(token_ids=[5], max_tokens=5))  # ends inside the fox
    assert "".join(pieces) == "aé"
    assert last.text.startswith("aé")
    assert last.finish == "length"


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [(["END"], "ab EN ", 9), (["END", "b "], "a", 3), (["ND", "END"], "ab EN ", 9), (["no such"], "ab EN ENDab EN E", 16)],
)
def test_stop_strings(tiny_bundle: ModelBundle, stop: list[str], text: str, tokens: int) -> None:
    """The text ends before the stop string, the tokens with it; a stream never shows a part of it."""
    made = engine(said(tiny_bundle, "ab EN END"))
    request = Request(token_ids=[5], max_tokens=16, stop=stop)
    finish = "length" if stop == ["no such"] else "stop"
    (whole,) = run(made, [request])
    assert (whole.text, len(whole.token_ids), len(whole.logprobs), whole.finish) == (text, tokens, tokens, finish)
    pieces, last = pieces_of(made, request)
    assert last == whole
    assert "".join(pieces) == text


def test_a_stop_string_ends_each_row_by_itself(tiny_bundle: ModelBundle) -> None:
    """In a batch, a row that has met its stop string is padded until the others have."""
    longest = [greedy(tiny_bundle.model, prompt, 24)[0] for prompt in PROMPTS]
    decode = tiny_bundle.processor.decode
    stop = decode(longest[0][1:2])
    assert "\ufffd" not in stop
    requests = [Request(token_ids=prompt, max_tokens=24, stop=[stop]) for prompt in PROMPTS]
    found = run(engine(tiny_bundle), requests)
    alone = [run(engine(tiny_bundle), [request])[0] for request in requests]
    assert len({len(completion.token_ids) for completion in found}) > 1
    for completion, one, ids in zip(found, alone, longest, strict=True):
        assert completion.token_ids == one.token_ids == ids[: len(completion.token_ids)]
        assert completion.text == one.text == decode(ids, skip_special_tokens=True).partition(stop)[0]
        assert completion.logprobs == pytest.approx(one.logprobs, abs=1e-5)


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_seeds_repeat_a_sample_and_leave_the_generator_alone(tiny_bundle: ModelBundle) -> None:
    made = engine(tiny_bundle)
    request = Request(token_ids=[5, 6], max_tokens=20, temperature=1.0, seed=7)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    (first,) = run(made, [request])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    (again,) = run(made, [request])
    (other,) = run(made, [replace(request, seed=8)])
    assert first == again
    assert first.token_ids != other.token_ids
    assert pieces_of(made, request)[1].token_ids == first.token_ids
    (free,), (free_again,) = run(made, [replace(request, seed=None)]), run(made, [replace(request, seed=None)])
    assert free.token_ids != free_again.token_ids


def test_a_sample_follows_the_distribution(tiny_bundle: ModelBundle) -> None:
    """First tokens of many samples at temperature 0.5, against softmax(logits / 0.5). Log-probabilities are the model's."""
    with torch.no_grad():
        logits = 6 * tiny_bundle.model(torch.tensor([[5, 6]])).logits[0, -1]
    bundle = tiny_bundle
    original = bundle.model.forward

    def sharper(*args: Any, **kwargs: Any) -> Any:
        outputs = original(*args, **kwargs)
        outputs.logits = 6 * outputs.logits
        return outputs

    bundle.model.forward = sharper
    torch.manual_seed(0)
    count = 2000
    requests = [Request(token_ids=[5, 6], max_tokens=1, temperature=0.5)] * count
    found = run(engine(bundle, count), requests)
    tokens = torch.tensor([completion.token_ids[0] for completion in found])
    expected = torch.softmax(logits / 0.5, -1)
    shares = torch.bincount(tokens, minlength=len(expected)) / count
    assert float((shares - expected).abs().sum()) / 2 < 0.1  # total variation; softmax(logits) itself is further off
    assert float((torch.softmax(logits, -1) - expected).abs().sum()) / 2 > 0.3
    model = torch.log_softmax(logits, -1)
    assert [completion.logprobs[0] for completion in found] == pytest.approx(model[tokens].tolist(), abs=1e-4)


def test_top_k_and_top_p_keep_the_likeliest(tiny_bundle: ModelBundle) -> None:
    expected = greedy(tiny_bundle.model, [5, 6], 12)[0]
    for limits in ({"top_k": 1}, {"top_p": 1e-6}):
        request = Request(token_ids=[5, 6], max_tokens=12, temperature=1.5, seed=1, **limits)  # type: ignore[arg-type]
        (found,) = run(engine(tiny_bundle), [request])
        assert found.token_ids == expected


def test_logprobs_are_log_softmax(tiny_bundle: ModelBundle) -> None:
    sequences = [*PROMPTS, list(range(3, 60))]
    found = engine(tiny_bundle, batch_size=2).logprobs(sequences)
    for ids, scores in zip(sequences, found, strict=True):
        with torch.no_grad():
            logits = tiny_bundle.model(torch.tensor([ids])).logits[0].double()
        expected = [float(torch.log_softmax(logits[n], -1)[ids[n + 1]]) for n in range(len(ids) - 1)]
        assert scores == pytest.approx(expected, abs=1e-5)
    assert found[1] == []  # one token predicts nothing


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_logprobs_do_not_depend_on_what_else_is_asked(precision: str, tiny_bundle: ModelBundle) -> None:
    """To the last bit: rows together, alone, and as the trainer's pass computes them."""
    attention.install(tiny_bundle.model)
    tiny_bundle.model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    sequences = [list(range(3, 60)), [*range(100, 150), *range(20, 90)], [5, 6, 7, 8], list(range(40, 200))]
    together = engine(tiny_bundle).logprobs(sequences)
    assert engine(tiny_bundle, batch_size=2).logprobs(sequences) == together
    assert [engine(tiny_bundle).logprobs([ids])[0] for ids in sequences] == together
    template = tiny_bundle.template
    assert template is not None
    steps = TorchBackend(TorchConfig(device="cpu", precision=precision)).prepare(  # type: ignore[arg-type]
        {"policy": FullTuned(tiny_bundle, FullConfig())},
        None,
        SimpleNamespace(learning_rate=1.0, weight_decay=0.0, betas=[0.9, 0.9]),
    )
    packed = template.pack([Sample(ids, [1.0] * len(ids)) for ids in sequences])
    assert packed is not None
    own = steps.forward("policy", template.collate([packed])).logprobs()
    assert own.tolist() == pytest.approx([value for row in together for value in row], abs=2e-6)


def test_sequences_that_a_model_lets_see_each_other_are_scored_apart(tiny_bundle: ModelBundle) -> None:
    """A model that ignores where sequences end: alone in a flat pass none is wrong."""
    sequences = [list(range(3, 30)), list(range(100, 150))]
    expected = engine(tiny_bundle).logprobs(sequences)
    plain = tiny_bundle.model.forward
    tiny_bundle.model.forward = lambda input_ids, **_: plain(input_ids)
    for n, found in enumerate(engine(tiny_bundle).logprobs(sequences)):
        assert found == pytest.approx(expected[n], abs=1e-5)


# --- streams and threads ----------------------------------------------------------------------------------------------


@pytest.fixture
def counted(tiny_bundle: ModelBundle) -> Iterator[tuple[TransformersEngine, list[int]]]:
    """An engine, and a list that grows with each forward pass of its model. No thread may outlive the test."""
    calls: list[int] = []
    tiny_bundle.model.register_forward_hook(lambda *_: calls.append(1))
    yield engine(tiny_bundle), calls
    assert workers() == []


def workers() -> list[threading.Thread]:
    """The engine's threads. One ends when its work does."""
    for _ in range(500):
        found = [thread for thread in threading.enumerate() if thread.name == "swift-engine"]
        if not found:
            break
        time.sleep(0.01)
    return found


def test_closing_a_stream_stops_its_thread(counted: tuple[TransformersEngine, list[int]]) -> None:
    made, calls = counted
    stream: Any = made.generate([Request(token_ids=[5, 6], max_tokens=900)], stream=True)
    next(stream)
    assert [thread.name for thread in threading.enumerate()].count("swift-engine") == 1
    stream.close()
    assert workers() == []
    stopped_at = len(calls)
    assert stopped_at < 400
    assert len(run(made, [Request(token_ids=[5, 6], max_tokens=2)])[0].token_ids) == 2  # the engine goes on
    assert len(calls) == stopped_at + 2


def test_an_error_in_a_stream_reaches_its_reader(counted: tuple[TransformersEngine, list[int]]) -> None:
    made, calls = counted
    run(made, [Request(token_ids=[5], max_tokens=1)])
    before = len(calls)

    def fail(*_: Any) -> None:
        if len(calls) == before + 3:
            raise RuntimeError("out of memory")

    made.model.register_forward_hook(fail)
    with pytest.raises(RunError, match=r"^the model failed: RuntimeError: out of memory$"):
        list(made.generate([Request(token_ids=[5, 6], max_tokens=9)], stream=True))
    assert len(run(made, [Request(token_ids=[5, 6], max_tokens=9)])[0].token_ids) == 9  # later ones work


# --- adapters ---------------------------------------------------------------------------------------------------------


def save_adapter(bundle: ModelBundle, folder: Path, seed: int, **options: Any) -> Any:
    """A random LoRA adapter by plain peft, saved; returns the base model with the adapter merged into it."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(copy.deepcopy(bundle.model), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return model.merge_and_unload().eval()


def test_adapters_are_chosen_by_the_request(tiny_bundle: ModelBundle, tmp_path: Path) -> None:
    models = {name: save_adapter(tiny_bundle, tmp_path / name, seed) for seed, name in enumerate(("one", "two"))}
    models[None] = copy.deepcopy(tiny_bundle.model)  # type: ignore[index]
    made = engine(tiny_bundle)
    for name in ("one", "two"):
        made.load_adapter(name, tmp_path / name)
    names = [None, "one", "two", None, "one"]
    found = run(made, [Request(token_ids=PROMPTS[2], max_tokens=10, adapter=name) for name in names])
    answers = set()
    for name, completion in zip(names, found, strict=True):
        ids, scores = greedy(models[name], PROMPTS[2], 10)  # type: ignore[index]
        assert completion.token_ids == ids
        assert completion.logprobs == pytest.approx(scores, abs=1e-4)
        answers.add(tuple(ids))
    assert len(answers) == 3
    for name in names:
        with torch.no_grad():
            expected = torch.log_softmax(models[name](torch.tensor([[5, 6]])).logits[0, 0], -1)[6]  # type: ignore[index]
        assert made.logprobs([[5, 6]], adapter=name)[0] == pytest.approx([float(expected)], abs=1e-4)
    with pytest.raises(RequestError, match=r"^adapter 'three' is not loaded; loaded: one, two$"):
        list(made.generate([Request(token_ids=[5], adapter="three")]))


def test_a_tuned_model_is_served_as_it_comes(tiny_bundle: ModelBundle, tmp_path: Path) -> None:
    """A model with an adapter of its own keeps it where a request names none, also after another was loaded."""
    save_adapter(tiny_bundle, tmp_path / "other", 1)
    own = peft.get_peft_model(tiny_bundle.model, peft.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False))
    made = engine(replace(tiny_bundle, model=own))
    before = made.logprobs(PROMPTS)
    made.load_adapter("other", tmp_path / "other")
    other = made.logprobs(PROMPTS, adapter="other")
    assert other != before
    assert made.logprobs(PROMPTS) == before
    with pytest.raises(RequestError, match=r"^adapter 'default' is the model's own; give .*other another name$"):
        made.load_adapter("default", tmp_path / "other")


def test_beside_an_adapter_that_holds_a_part_of_the_base_there_is_no_base(tiny_bundle: ModelBundle, tmp_path: Path) -> None:
    """PiSSA takes its first values out of the base's weights, which are then no longer the base's."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(copy.deepcopy(tiny_bundle.model), config)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data *= 1.5
    tuned.save_pretrained(tmp_path)
    expected = engine(replace(tiny_bundle, model=tuned)).logprobs(PROMPTS)
    made = engine(tiny_bundle)
    assert made.logprobs(PROMPTS) != expected
    made.load_adapter("pissa", tmp_path)
    assert made.logprobs(PROMPTS, adapter="pissa") == expected
    message = r"^adapter 'pissa' holds a part of the base's weights; nothing is served beside it$"
    with pytest.raises(RequestError, match=message):
        made.logprobs(PROMPTS)
    for stream in (False, True):
        with pytest.raises(RequestError, match=message):
            list(made.generate([Request(token_ids=[5])], stream=stream))


def test_adapters_that_do_not_fit(tiny_bundle: ModelBundle, tmp_path: Path) -> None:
    made = engine(tiny_bundle)
    before = made.logprobs(PROMPTS)

    def refused(message: str) -> None:
        with pytest.raises(RequestError, match=rf"^adapter {tmp_path / 'bad'} cannot be loaded: .*{message}") as caught:
            made.load_adapter("bad", tmp_path / "bad")
        assert "\n" not in str(caught.value)
        with pytest.raises(RequestError, match=r"adapter 'bad' is not loaded; loaded: none$"):
            list(made.generate([Request(token_ids=[5], adapter="bad")]))

    refused("")
    save_adapter(tiny_bundle, tmp_path / "bad", 1)
    file = tmp_path / "bad" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if "layers.1" not in name}, file)
    refused("missing adapter keys")
    save_file({name: tensor[:, :1].contiguous() for name, tensor in tensors.items()}, file)
    refused("size mismatch")
    assert made.logprobs(PROMPTS) == before


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_synced_weights_carry_their_version(tiny_bundle: ModelBundle) -> None:
    other = copy.deepcopy(tiny_bundle.model)
    for parameter in other.parameters():
        parameter.data.add_(0.05)
    made = engine(tiny_bundle)
    made.sync_weights(iter(other.state_dict().items()), version=3)
    (found,) = run(made, [Request(token_ids=PROMPTS[2], max_tokens=8)])
    assert (found.token_ids, found.weight_version) == (greedy(other, PROMPTS[2], 8)[0], 3)
    made.sleep()
    made.wake()
    assert run(made, [Request(token_ids=PROMPTS[2], max_tokens=8)]) == [found]


def test_what_it_does_not_do(tiny_bundle: ModelBundle) -> None:
    made = engine(tiny_bundle)
    with pytest.raises(CapabilityError, match="does not embed"):
        made.embed([[1]])
    with pytest.raises(CapabilityError, match="does not score"):
        made.score([[1]])
    assert made.capabilities == {"stream", "concurrent", "constraint", "adapters", "sync", "sleep"}
    with pytest.raises(RequestError, match="the engine needs a bundle with its template"):
        engine(replace(tiny_bundle, template=None))


def test_smollm2_in_a_batch_of_questions(request: pytest.FixtureRequest) -> None:
    """A real model: a padded batch gives each question the answer that it gives alone, by transformers itself."""
    convert = pytest.importorskip("swift_plugin_smollm.convert")
    from swift_plugin_transformers.chat import ChatTemplate
    from swift_plugin_transformers.config import ChatTemplateConfig, TransformersConfig
    from swift_plugin_transformers.loading import load_model, load_processor

    try:
        folder = str(convert.folder())
    except RequestError as err:
        pytest.skip(str(err))
    tokenizer = load_processor(folder, TransformersConfig())
    bundle = load_model(folder, tokenizer, {}, TransformersConfig())
    bundle.template = ChatTemplate(tokenizer, ChatTemplateConfig())
    questions = ["What is the capital of France?", "Say hi.", "Name three colours of the rainbow, and nothing else."]
    made = engine(bundle)
    requests = [Request([{"role": "user", "content": text}], max_tokens=12) for text in questions]
    found = run(made, requests)
    assert (found[0].text, found[0].finish) == ("The capital of France is Paris.", "stop")
    for completion, question in zip(found, questions, strict=True):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        alone = bundle.model.generate(**prompt, do_sample=False, max_new_tokens=12)[0, prompt["input_ids"].shape[1] :]
        assert completion.token_ids == alone.tolist()
    pieces, last = pieces_of(made, requests[0])
    assert "".join(pieces) == last.text == found[0].text
