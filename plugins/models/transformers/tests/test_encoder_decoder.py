"""Encoder-decoders, against the library's own way: `model(input_ids, labels=...)` for loss and gradients, `generate` for the
answers.

T5 with relative positions and no chat template, BART with absolute ones, T5Gemma with a chat template.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from swift_core.errors import RequestError
from swift_core.types import ModelBundle, Request, Sample
from swift_plugin_full.config import FullConfig
from swift_plugin_full.tuner import FullTuned
from swift_plugin_supervised.config import SupervisedConfig
from swift_plugin_supervised.loop import cross_entropy
from swift_plugin_torch.backend import TorchBackend
from swift_plugin_torch.config import TorchConfig, TransformersEngineConfig
from swift_plugin_torch.engine import TransformersEngine
from swift_plugin_transformers.config import ChatTemplateConfig, PlainTemplateConfig, TransformersConfig
from swift_plugin_transformers.hooks import swift_make_template
from swift_plugin_transformers.loading import load_model, load_processor
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

SIZE = {"vocab_size": 272, "pad_token_id": 0, "eos_token_id": 1}
CHAT = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "translate: the house"}, {"role": "assistant", "content": "das Haus"}]},
    {"messages": [{"role": "user", "content": "two"}, {"role": "assistant", "content": "zwei und mehr"}]},
]
TALK = {
    "messages": [
        {"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Name?"}, {"role": "assistant", "content": "Ann"},
    ]
}  # fmt: skip


def t5() -> Any:
    config = transformers.T5Config(
        **SIZE,
        d_model=32,
        d_ff=48,
        d_kv=8,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def bart() -> Any:
    config = transformers.BartConfig(
        **SIZE, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=128, dropout=0.0, bos_token_id=2, init_std=0.2,
        decoder_start_token_id=1, forced_eos_token_id=None,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def t5gemma() -> Any:
    part = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "bos_token_id": 2, "sliding_window": 8, "query_pre_attn_scalar": 8, **SIZE,
    }  # fmt: skip
    return transformers.T5GemmaForConditionalGeneration(transformers.T5GemmaConfig(encoder=part, decoder=part, **SIZE))


SPREAD = {"t5": 1.5, "bart": 1.0, "t5gemma": 3.0}
MODELS = {"t5": t5, "bart": bart, "t5gemma": t5gemma}


def tokenizer(chat: bool) -> Any:
    words = ["<pad>", "</s>", "<s>", "<user>", "<assistant>", "<system>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    own = Tokenizer(models.BPE(vocab={word: n for n, word in enumerate(words)}, merges=[]))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    own.decoder = decoders.ByteLevel()
    own.add_special_tokens(words[:6])
    own.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=own, pad_token="<pad>", eos_token="</s>", bos_token="<s>")
    fast.chat_template = CHAT if chat else None
    return fast


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = MODELS[request.param]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "shared" not in name:
                parameter.mul_(SPREAD[request.param])  # so that answers differ from prompt to prompt, and sums of floats hardly
    model.save_pretrained(path)
    tokenizer(request.param == "t5gemma").save_pretrained(path)
    return path


def opened(folder: Path) -> ModelBundle:
    processor = load_processor(str(folder), TransformersConfig())
    load: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
    bundle = load_model(str(folder), processor, load, TransformersConfig())
    bundle.template = swift_make_template("checkpoint", processor, ChatTemplateConfig())
    return bundle


def steps_of(bundle: ModelBundle) -> tuple[Any, FullTuned]:
    tuned = FullTuned(bundle, FullConfig())
    backend = TorchBackend(TorchConfig(device="cpu", precision="fp32", threads=1))
    return backend.prepare({"policy": tuned}, None, SupervisedConfig()), tuned


def asked(template: Any, row: dict[str, Any]) -> list[int]:
    return list(template.prompt(row["messages"][:-1]))


def test_loss_and_gradients_are_the_librarys(folder: Path) -> None:
    """In float32 to 1e-5, on two rows of different lengths in one padded pass: the library gets each alone."""
    bundle = opened(folder)
    template: Any = bundle.template
    plain = copy.deepcopy(bundle.model).train()
    samples = [sample for row in ROWS for sample in template.encode(row)]
    total, count = torch.zeros(()), 0
    for row, sample in zip(ROWS, samples, strict=True):
        labels = [token for token, weight in zip(sample.input_ids, sample.weights, strict=True) if weight]
        loss = plain(input_ids=torch.tensor([asked(template, row)]), labels=torch.tensor([labels])).loss
        total, count = total + loss * len(labels), count + len(labels)
    (total / count).backward()
    steps, tuned = steps_of(bundle)
    result = steps.forward_backward([template.collate(samples)], cross_entropy)
    assert (result.trained_tokens, result.weight) == (count, float(count))
    assert result.loss == pytest.approx(float((total / count).detach()), abs=1e-5)
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in tuned.trainable().items()}
    assert expected.keys() == {name for name, grad in found.items() if grad is not None}
    size = max(1.0, *(float(grad.abs().max()) for grad in expected.values()))
    gaps = {name: float((found[name] - grad).abs().max()) for name, grad in expected.items()}
    assert max(gaps.values()) <= 1e-5 * size, max(gaps.items(), key=lambda item: item[1])


def test_answers_are_those_of_the_librarys_generate(folder: Path) -> None:
    """Token for token, alone and with a prompt of another length beside."""
    bundle = opened(folder)
    template: Any = bundle.template
    prompts = [asked(template, row) for row in ROWS]
    expected = []
    for ids in prompts:
        row = torch.tensor([ids])
        made = bundle.model.generate(input_ids=row, attention_mask=torch.ones_like(row), max_new_tokens=12, do_sample=False)
        expected.append(made[0, 1:].tolist())
    engine = TransformersEngine(bundle, TransformersEngineConfig())
    done = sorted(
        engine.generate([Request(messages=row["messages"][:-1], max_tokens=12) for row in ROWS]), key=lambda d: d.index
    )
    assert [completion.token_ids for completion in done] == expected
    assert expected[0] != expected[1]
    assert [completion.prompt_tokens for completion in done] == [len(ids) for ids in prompts]
    # what it says of its tokens is what training reckons with
    steps, _ = steps_of(bundle)
    for ids, completion in zip(prompts, done, strict=True):
        answer, start = completion.token_ids, template.tokenizer.decoder_start
        weights = [0.0] * (len(ids) + 1) + [1.0] * len(answer)
        sample = Sample([*ids, start, *answer], weights, label={"encoder": len(ids), "characters": 0})
        trained = steps.forward("policy", template.collate([sample])).logprobs()
        (scored,) = engine.logprobs([sample.input_ids], samples=[sample])
        assert scored[: len(ids)] == [0.0] * len(ids)
        torch.testing.assert_close(torch.tensor(completion.logprobs), trained, atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.tensor(scored[len(ids) :]), trained, atol=1e-5, rtol=0)
    engine.close()


def test_each_answer_is_a_sample_of_what_stands_before_it(folder: Path) -> None:
    template: Any = opened(folder).template
    chat = bool(template.tokenizer.chat_template)
    samples = template.encode(TALK)
    assert [sample.turns for sample in samples] == [[2], [4]]
    for sample, (before, answer) in zip(samples, [(2, "Yes?"), (4, "Ann")], strict=True):
        count = sample.label["encoder"]
        assert sample.input_ids[:count] == list(template.prompt(TALK["messages"][:before]))
        assert sample.input_ids[count] == template.tokenizer.decoder_start
        assert template.tokenizer.decode(sample.input_ids[count + 1 :]) == f"{answer}</s>"
        assert sample.weights == [0.0] * (count + 1) + [1.0] * (len(answer) + 1)
        assert [sample.text[a:b] for a, b in sample.spans] == [f"{answer}</s>" if chat else answer]
    text = template.tokenizer.decode(template.prompt(TALK["messages"][:4]))
    bare = "Be short.\nHi\nYes?\nName?</s>"
    full = "<system>Be short.</s><user>Hi</s><assistant>Yes?</s><user>Name?</s><assistant>"
    assert text == (full if chat else bare)
    assert template.pack(samples) is None


def test_what_cannot_be_trained_is_said(folder: Path) -> None:
    processor = load_processor(str(folder), TransformersConfig())
    template: Any = swift_make_template("plain", processor, PlainTemplateConfig())
    with pytest.raises(ValueError, match="nothing stands before the answer"):
        template.encode({"messages": [{"role": "assistant", "content": "a text alone"}]})
    with pytest.raises(ValueError, match="the row has tools, and this checkpoint no chat template"):
        template.encode({**ROWS[0], "tools": [{"type": "function"}]})
    with pytest.raises(RequestError, match="samples of this trainer tell no prompt from its answer"):
        template.collate([Sample([5, 6], [1.0, 1.0])])
    with pytest.raises(RequestError, match="loss=all: an encoder-decoder does not predict its prompt"):
        swift_make_template("checkpoint", processor, ChatTemplateConfig(loss="all"))
    processor.decoder_start = None
    with pytest.raises(RequestError, match="names no decoder_start_token_id"):
        swift_make_template("checkpoint", processor, ChatTemplateConfig())


def test_weights_of_messages_and_spans(folder: Path) -> None:
    processor = load_processor(str(folder), TransformersConfig())
    template: Any = swift_make_template("checkpoint", processor, ChatTemplateConfig(loss="spans", spans={"H.us": 2.0}))
    user, answer = ROWS[0]["messages"]
    (sample,) = template.encode({"messages": [user, {**answer, "weight": 0.5}]})
    assert sample.weights[sample.label["encoder"] :] == [0.0] + [0.5] * 4 + [1.0] * 4 + [0.5]
    assert [row["role"] for row in TALK["messages"]][2] == "assistant"
    last: Any = swift_make_template("checkpoint", processor, ChatTemplateConfig(loss="last"))
    assert [sample.turns for sample in last.encode(TALK)] == [[4]]


def test_the_languages_of_a_translator_are_set() -> None:
    """NLLB's tokenizer writes the source's language before a prompt, and the target's before an answer."""
    nllb = transformers.NllbTokenizer(src_lang="deu_Latn", tgt_lang="deu_Latn")
    nllb.decoder_start, codes = 2, {code: nllb.convert_tokens_to_ids(code) for code in ("eng_Latn", "fra_Latn")}
    options = ChatTemplateConfig(kwargs={"src_lang": "eng_Latn", "tgt_lang": "fra_Latn"})
    template: Any = swift_make_template("checkpoint", nllb, options)
    (sample,) = template.encode(ROWS[0])
    count, eos = sample.label["encoder"], nllb.eos_token_id
    assert (sample.input_ids[0], sample.input_ids[count - 1]) == (codes["eng_Latn"], eos)
    assert (sample.input_ids[count], sample.input_ids[count + 1], sample.input_ids[-1]) == (2, codes["fra_Latn"], eos)
    assert sample.weights[count + 1 :] == [1.0] * (len(sample.input_ids) - count - 1)
    with pytest.raises(RequestError, match=r"'enable_thinking': .*set: src_lang, tgt_lang"):
        swift_make_template("checkpoint", nllb, ChatTemplateConfig(kwargs={"enable_thinking": False}))
