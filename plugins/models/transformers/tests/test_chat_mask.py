"""The `checkpoint` template against transformers' own rendering: the text byte for byte, the tokens, and what is trained.

What is expected of a template is written down here by hand: its answer's opening and its end-of-turn marker.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from swift_core.config import build_options
from swift_core.errors import RequestError
from swift_core.testing import TemplateContract
from swift_core.types import Row, Sample
from swift_plugin_transformers.chat import ChatTemplate
from swift_plugin_transformers.config import ChatTemplateConfig
from swift_plugin_transformers.testing import make_tokenizer
from transformers import AutoTokenizer

FIXTURES = Path(__file__).parents[5] / "shared" / "fixtures"
IM, EOT, DEEPSEEK = "<|im_end|>", "<|eot_id|>", "<｜end▁of▁sentence｜>"

TALK: list[Row] = [
    {"role": "user", "content": "Do you like Köln? 🦊"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Yes."},  # the answer's own words, where nothing is trained
    {"role": "assistant", "content": "Yes."},
]
CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather", "description": "The weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "its name"}}},
        },
    }
]  # fmt: skip
TOOL_TALK: list[Row] = [
    {"role": "user", "content": "Is it fine in Köln?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call00001", "name": "weather", "content": "sunny"},
    {"role": "assistant", "content": "Sunny."},
]


class TestCheckpointTemplate(TemplateContract):
    distribution, id = "swift-plugin-transformers", "checkpoint"


class TestPlainTemplate(TemplateContract):
    distribution, id, trains_prompt = "swift-plugin-transformers", "plain", True


def make(tokenizer: Any = None, **options: Any) -> ChatTemplate:
    config = build_options(ChatTemplateConfig, options, "template.checkpoint")
    assert config is not None
    return ChatTemplate(tokenizer or make_tokenizer(), config)


def published(name: str) -> ChatTemplate:
    """A published chat template on the byte-level tokenizer."""
    file = FIXTURES / "chat-templates" / f"{name}.jinja"
    if not file.is_file():
        pytest.skip(f"needs the fixture {file}")
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    return make(tokenizer, file=str(file))


def real(name: str) -> Any:
    folder = FIXTURES / "tokenizers" / name
    if not folder.is_dir():
        pytest.skip(f"needs the fixture {folder}")
    return AutoTokenizer.from_pretrained(folder)


def trained(template: ChatTemplate, sample: Sample) -> str:
    """Text of the tokens with a weight, decoded from their ids."""
    ids = [token for token, weight in zip(sample.input_ids, sample.weights, strict=True) if weight]
    return str(template.tokenizer.decode(ids, skip_special_tokens=False))


def spans(sample: Sample) -> list[str]:
    return [sample.text[start:end] for start, end in sample.spans]


def check_whole(template: ChatTemplate, sample: Sample, messages: list[Row], tools: Any = None, **kwargs: Any) -> None:
    """The sample's text and tokens are transformers' own, and its trained tokens are its trained characters."""
    plain = [{**message, "content": message.get("content") or ""} for message in messages]
    options = {"tools": tools, "chat_template": template.source, **sample.kwargs}
    assert kwargs.items() <= sample.kwargs.items()
    text = template.tokenizer.apply_chat_template(plain, tokenize=False, **options)
    ids = template.tokenizer.apply_chat_template(plain, tokenize=True, return_dict=False, **options)
    if sample.appended:
        text = text.rstrip() + sample.appended
        ids = template.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert sample.text == text
    assert sample.input_ids == ids
    assert trained(template, sample) == "".join(spans(sample))


# name: what stands between the generation prompt and the answer, and what ends the turn
ANSWERS = {
    "Bielik-11B-v3.0-Instruct": ("", IM),
    "ByteDance-Seed-OSS": ("", "<seed:eos>"),
    "GigaChat3-10B-A1.8B": ("", "<|message_sep|>"),
    "HuggingFaceTB-SmolLM3-3B": ("", IM),
    "Kimi-K2-Instruct": ("", IM),
    "LFM2-8B-A1B": ("", IM),
    "Qwen-Qwen2.5-7B-Instruct": ("", IM),
    "Qwen3-Coder": ("", IM),
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": ("", DEEPSEEK),  # its generation prompt opens <think>: a mismatch
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": ("", DEEPSEEK),
    "deepseek-ai-DeepSeek-V3.1": ("", DEEPSEEK),
    "google-gemma-2-2b-it": ("", "<end_of_turn>"),
    "google-gemma-4-31B-it-interleaved": ("", "<turn|>"),
    "meetkai-functionary-medium-v3.2": ("all\n", EOT),
    "meta-llama-Llama-3.1-8B-Instruct": ("", EOT),
    "meta-llama-Llama-3.3-70B-Instruct": ("", EOT),
    "microsoft-Phi-3.5-mini-instruct": ("", "<|end|>"),
    "mistralai-Mistral-Nemo-Instruct-2407": ("", IM),  # its marker is the tokenizer's end-of-text token, here <|im_end|>
    "moonshotai-Kimi-K2": ("", IM),
    "unsloth-mistral-Devstral-Small-2507": ("", IM),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_published_templates_train_each_answer_and_its_end(name: str) -> None:
    template = published(name)
    (sample,) = template.encode({"messages": TALK})
    check_whole(template, sample, TALK)
    assert sample.kwargs == ({"enable_thinking": False} if "SmolLM3" in name else {})
    opening, end = ANSWERS[name]
    assert spans(sample) == [f"{opening}Yes.{end}"] * 2
    assert sample.turns == [1, 3]
    assert sample.appended is None
    assert set(sample.notes) <= {"prompt-mismatch"}
    assert ("prompt-mismatch" in sample.notes) == (name.startswith("deepseek-ai-DeepSeek-R1") or "gemma-4" in name)
    # The last one is the last in the text, not an earlier message with the same words.
    assert sample.text[: sample.spans[1][0]].count("Yes.") == 2


# Tool calls: what is trained of the call and of the answer after its result.
ARGUMENTS = '{"name": "weather", "arguments": {"city": "Köln"}}'
CALLS = {
    "Bielik-11B-v3.0-Instruct": (f"\n<tool_call>\n{ARGUMENTS}\n</tool_call>{IM}", f"Sunny.{IM}"),
    "ByteDance-Seed-OSS": (
        "<seed:tool_call>\n<function=weather>\n<parameter=city>Köln</parameter>\n</function>\n</seed:tool_call><seed:eos>",
        "Sunny.<seed:eos>",
    ),
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": (f"<tool_call>\n{ARGUMENTS}\n</tool_call>{IM}", f"Sunny.{IM}"),
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": (f"<tool_call>\n{ARGUMENTS}\n</tool_call>{IM}", f"Sunny.{IM}"),
    "Qwen-Qwen2.5-7B-Instruct": (f"<tool_call>\n{ARGUMENTS}\n</tool_call>{IM}", f"Sunny.{IM}"),
    "Qwen3-Coder": (
        f"<tool_call>\n<function=weather>\n<parameter=city>\nKöln\n</parameter>\n</function>\n</tool_call>{IM}", f"Sunny.{IM}"
    ),
    "deepseek-ai-DeepSeek-V3.1": (
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Köln"}<｜tool▁call▁end｜>'
        f"<｜tool▁calls▁end｜>{DEEPSEEK}",
        f"Sunny.{DEEPSEEK}",
    ),
    "google-gemma-4-31B-it-interleaved": (
        '<|tool_call>call:weather{city:<|"|>Köln<|"|>}<tool_call|><turn|>', "Sunny.<turn|>"
    ),
    "meetkai-functionary-medium-v3.2": (f'weather\n{{"city": "Köln"}}{EOT}', f"all\nSunny.{EOT}"),
    "meta-llama-Llama-3.1-8B-Instruct": (f'{{"name": "weather", "parameters": {{"city": "Köln"}}}}{EOT}', f"Sunny.{EOT}"),
    "mistralai-Mistral-Nemo-Instruct-2407": (
        f'[TOOL_CALLS][{{"name": "weather", "arguments": {{"city": "Köln"}}, "id": "call00001"}}]{IM}', f"Sunny.{IM}"
    ),
    "openai-gpt-oss-120b": (
        ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Köln"}<|call|>',
        "<|channel|>final<|message|>Sunny.<|return|>",
    ),
    "unsloth-mistral-Devstral-Small-2507": (f'[TOOL_CALLS]weather[ARGS]{{"city": "Köln"}}{IM}', f"Sunny.{IM}"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_tool_calls_with_object_arguments_are_trained_to_their_end(name: str) -> None:
    template = published(name)
    (sample,) = template.encode({"messages": TOOL_TALK, "tools": TOOLS})
    if name != "meetkai-functionary-medium-v3.2":  # takes the arguments as text, so transformers has to be given that
        check_whole(template, sample, TOOL_TALK, TOOLS)
    assert spans(sample) == list(CALLS[name])
    assert trained(template, sample) == "".join(CALLS[name])
    assert sample.turns == [1, 3]
    assert "sunny" in sample.text


def test_arguments_go_as_text_where_the_template_refuses_an_object() -> None:
    name = "meetkai-functionary-medium-v3.2"
    template = published(name)
    text = [{**CALL, "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}]
    messages = [TOOL_TALK[0], {"role": "assistant", "content": "", "tool_calls": text}, *TOOL_TALK[2:]]
    (sample,) = template.encode({"messages": TOOL_TALK, "tools": TOOLS})
    assert sample.text == template.tokenizer.apply_chat_template(
        messages, tools=TOOLS, tokenize=False, chat_template=template.source
    )


@pytest.mark.parametrize(
    "name", ["HuggingFaceTB-SmolLM3-3B", "LFM2-8B-A1B", "google-gemma-2-2b-it", "microsoft-Phi-3.5-mini-instruct"]
)
def test_a_template_without_tool_calls_refuses_the_row(name: str) -> None:
    with pytest.raises(ValueError, match="the chat template leaves out what the assistant says: 'weather'"):
        published(name).encode({"messages": TOOL_TALK, "tools": TOOLS})


@pytest.mark.parametrize("name", ["GLM-4.6", "GLM-5.2"])
def test_an_end_marker_that_opens_the_next_message_is_appended(name: str) -> None:
    """GLM ends no turn: an answer ends where <|user|> opens, a call where <|observation|> does. Only the last turn of a row
    lacks it; thinking is off for rows without thoughts, so that the empty block belongs to the prompt."""
    template = published(name)
    (sample,) = template.encode({"messages": TALK})
    check_whole(template, sample, TALK, enable_thinking=False)
    gap = "\n" if name == "GLM-4.6" else ""
    assert (spans(sample), sample.turns) == ([f"{gap}Yes.<|user|>"] * 2, [1, 3])
    assert (sample.appended, sample.notes) == ("<|user|>", [])
    assert sample.text.endswith("Yes.<|user|>")
    (both,) = template.encode({"messages": TOOL_TALK, "tools": TOOLS})
    check_whole(template, both, TOOL_TALK, TOOLS)
    call, answer = spans(both)
    assert both.appended == "<|user|>"
    assert answer == f"{gap}Sunny.<|user|>"
    assert call.startswith(f"{gap}<tool_call>weather")
    assert call.endswith("Köln</arg_value>\n</tool_call><|observation|>".replace("\n", "\n" * ("4" in name)))
    (alone,) = template.encode({"messages": TOOL_TALK[:2], "tools": TOOLS})
    assert (alone.appended, spans(alone)) == ("<|observation|>", [call])


def test_an_end_marker_is_found_after_dropped_thinking() -> None:
    """GLM leaves earlier thinking out, so that what follows the turn stands elsewhere in the longer rendering."""
    thoughts = "thoughts that are rather longer than all that comes after"
    messages = [TALK[0], {"role": "assistant", "reasoning_content": thoughts, "content": "Yes."}, *TALK[2:]]
    last, first = published("GLM-4.6").encode({"messages": messages})
    assert (spans(first), first.notes) == ([f"\n<think>{thoughts}</think>\nYes.<|user|>"], ["own-sample"])
    # The last answer has no thoughts in a row that has some: the block that the template wrote there has weight 0.
    assert (spans(last), last.notes) == (["Yes.<|user|>"], ["thinking-block"])
    assert last.text.endswith("\n<think></think>\nYes.<|user|>")
    assert thoughts not in last.text


def test_a_template_without_any_end_marker_refuses_the_row(tmp_path: Path) -> None:
    (tmp_path / "bare.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    with pytest.raises(ValueError, match=r"^message 1: the chat template writes no end marker after the answer$"):
        make(file=str(tmp_path / "bare.jinja")).encode({"messages": TALK})


def test_thinking_that_the_template_drops_later_gives_samples_of_their_own() -> None:
    """Qwen3 renders thinking in the last turn only: the first answer is trained as it was generated, apart."""
    template = make(real("qwen3"))
    messages: list[Row] = [TALK[0], {"role": "assistant", "content": "<think>\nA fox.\n</think>\n\nYes."}, *TALK[2:]]
    last, first = template.encode({"messages": messages})
    check_whole(template, last, messages)
    check_whole(template, first, messages[:2])
    assert (last.turns, last.notes, first.turns, first.notes) == ([3], ["thinking-block"], [1], ["own-sample"])
    assert spans(first) == [f"<think>\nA fox.\n</think>\n\nYes.{IM}"]
    assert spans(last) == [f"Yes.{IM}"]
    assert last.text.endswith(f"<think>\n\n</think>\n\nYes.{IM}\n")
    assert "A fox" not in last.text


def test_template_arguments_of_config_and_row_reach_the_rendering() -> None:
    tokenizer = real("qwen3")
    row = {"messages": TALK[:2]}
    (found,) = make(tokenizer).encode(row)
    (plain,) = make(tokenizer, kwargs={"enable_thinking": False}).encode(row)
    (asked,) = make(tokenizer, kwargs={"enable_thinking": True}).encode(
        {**row, "chat_template_kwargs": {"enable_thinking": False}}
    )
    (thinking,) = make(tokenizer, kwargs={"enable_thinking": True}).encode(row)
    # With thinking off, which is found without being asked for, the empty thought belongs to the prompt.
    assert spans(found) == spans(plain) == spans(asked) == [f"Yes.{IM}"]
    assert found.kwargs == plain.kwargs == asked.kwargs == {"enable_thinking": False}
    # Asked to keep thinking on, the engine does; but a thought without words is not the model's to learn.
    assert (spans(thinking), thinking.kwargs) == ([f"Yes.{IM}"], {"enable_thinking": True})
    assert thinking.notes == ["thinking-block"]
    prompt = tokenizer.apply_chat_template(TALK[:1], add_generation_prompt=True, enable_thinking=False, return_dict=False)
    assert make(tokenizer, kwargs={"enable_thinking": False}).prompt(TALK[:1]) == prompt
    assert plain.input_ids[: len(prompt)] == prompt


# Each real tokenizer with its own chat template, or with the published one of its family.
REAL = {
    "qwen3": (None, IM),
    "llama3_1": ("meta-llama-Llama-3.1-8B-Instruct", EOT),
    "deepseek_v3": (None, DEEPSEEK),
    "smollm2": (None, IM),
}


@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_train_exactly_content_and_end_marker(name: str, request: pytest.FixtureRequest) -> None:
    file, end = REAL[name]
    tokenizer = request.getfixturevalue("smollm_tokenizer") if name == "smollm2" else real(name)
    template = make(tokenizer, **({"file": str(FIXTURES / "chat-templates" / f"{file}.jinja")} if file else {}))
    texts = ["Yes.", "In 2024: 1,234,567 🦊\n\n- 日本語\n- ça va?", "Yes.", "def f(x):\n      return x  # x"]
    kwargs = {"enable_thinking": False} if name == "qwen3" else {}
    messages: list[Row] = [{"role": "system", "content": "Be brief."}]
    for text in texts:
        messages += [{"role": "user", "content": f"{text} Yes."}, {"role": "assistant", "content": text}]
    samples = template.encode({"messages": messages, "chat_template_kwargs": kwargs})
    check_whole(template, samples[0], messages, **kwargs)
    got = {turn: span for sample in samples for turn, span in zip(sample.turns, spans(sample), strict=True)}
    assert sorted(got) == [2, 4, 6, 8]
    for turn, text in zip((2, 4, 6, 8), texts, strict=True):
        assert got[turn].removeprefix("<think>\n\n</think>\n\n") == text + end
    for sample in samples:
        assert trained(template, sample) == "".join(spans(sample))
        assert set(sample.weights) == {0.0, 1.0}
    assert tokenizer.eos_token_id in template.stop_ids()


def test_smollm2_multi_turn_ids_prompt_and_stop(smollm_tokenizer: Any) -> None:
    """The embedded checkpoint, spelled out: its default system message, each turn, and the prompt of inference."""
    template = make(smollm_tokenizer)
    (sample,) = template.encode({"messages": TALK})
    assert sample.text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nDo you like Köln? 🦊<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
        "<|im_start|>user\nYes.<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    )
    assert sample.input_ids == smollm_tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=False)
    yes = smollm_tokenizer("Yes.<|im_end|>", add_special_tokens=False)["input_ids"]
    assert [t for t, w in zip(sample.input_ids, sample.weights, strict=True) if w] == yes * 2
    # "<|im_start|>assistant\nYes.<|im_end|>\n" closes the row: its last token, the line break, is not trained.
    assert sample.weights[-len(yes) - 4 :] == [0.0, 0.0, 0.0, *[1.0] * len(yes), 0.0]
    prompt = smollm_tokenizer.apply_chat_template(TALK[:3], add_generation_prompt=True, tokenize=True, return_dict=False)
    assert template.prompt(TALK[:3]) == prompt
    assert sample.input_ids[: len(prompt)] == prompt
    assert template.stop_ids() == [smollm_tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert template.decode([*yes, *yes]) == "Yes.Yes."


def test_a_token_across_the_border_of_the_prompt_is_not_trained(smollm_tokenizer: Any) -> None:
    """The line break of the prompt and the answer's first blank are one token, which the model never has to produce."""
    template = make(smollm_tokenizer)
    (sample,) = template.encode({"messages": [TALK[0], {"role": "assistant", "content": "  Yes."}]})
    assert spans(sample) == [f"  Yes.{IM}"]
    assert trained(template, sample) == f" Yes.{IM}"


@pytest.fixture(scope="module")
def smollm_tokenizer() -> Any:
    convert = pytest.importorskip("swift_plugin_smollm.convert")
    try:
        return AutoTokenizer.from_pretrained(convert.folder())
    except RequestError as err:
        pytest.skip(str(err))


def weight_of_turns(sample: Sample) -> list[set[float]]:
    """The weights inside each `Yes.<|im_end|>` of a byte-level sample, trained or not."""
    found, at = [], 0
    header = make_tokenizer()("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    while at < len(sample.input_ids) - len(header):
        if sample.input_ids[at : at + len(header)] == header:
            found.append(set(sample.weights[at + len(header) : at + len(header) + 5]))
        at += 1
    return found


def test_train_false_weight_and_the_last_turn() -> None:
    def row(**first: Any) -> Row:
        return {"messages": [TALK[0], {**TALK[1], **first}, *TALK[2:]]}

    (both,) = make().encode(row())
    assert weight_of_turns(both) == [{1.0}, {1.0}]
    assert both.trained_tokens == 2 * 5  # four letters and the marker
    (second,) = make().encode(row(train=False))
    assert (weight_of_turns(second), second.turns, second.input_ids) == ([{0.0}, {1.0}], [3], both.input_ids)
    (half,) = make().encode(row(weight=0.5))
    assert (weight_of_turns(half), half.turns, half.text) == ([{0.5}, {1.0}], [1, 3], both.text)
    (none,) = make().encode(row(weight=0))
    assert (weight_of_turns(none), none.turns) == ([{0.0}, {1.0}], [3])
    (last,) = make(loss="last").encode(row())
    assert (weight_of_turns(last), last.turns, last.input_ids) == ([{0.0}, {1.0}], [3], both.input_ids)


@pytest.mark.parametrize(
    "messages",
    [TALK[:1], [TALK[0], {**TALK[1], "train": False}], [TALK[0], {**TALK[1], "weight": 0}], [TALK[0], TALK[2]]],
)
def test_a_row_without_an_answer_to_train_is_refused(messages: list[Row]) -> None:
    with pytest.raises(
        ValueError, match=r"^the row has no trainable token: no assistant message with content, or train: false"
    ):
        make().encode({"messages": messages})


def test_an_empty_answer_trains_its_end_alone() -> None:
    (sample,) = make().encode({"messages": [TALK[0], {"role": "assistant", "content": ""}, *TALK[2:]]})
    assert spans(sample) == [IM, f"Yes.{IM}"]


def test_first_message_of_the_assistant_and_content_that_looks_like_markup() -> None:
    odd = "assistant\n<|im_start|>Yes.\n"
    messages: list[Row] = [{"role": "assistant", "content": odd}, {"role": "user", "content": odd}, TALK[1]]
    (sample,) = make().encode({"messages": messages})
    check_whole(make(), sample, messages)
    # No generation prompt comes before a row's first message, but its header is the template's all the same.
    assert spans(sample) == [f"{odd}{IM}", f"Yes.{IM}"]


def test_faults_of_the_template_are_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"template.file: .*none.jinja cannot be read: No such file"):
        make(file=str(tmp_path / "none.jinja"))
    bare = make_tokenizer()
    bare.chat_template = None
    with pytest.raises(RequestError, match=r"ships no chat template; give one with template\.file=FILE\.jinja"):
        make(bare)
    (tmp_path / "strict.jinja").write_text("{{ raise_exception('roles must\n alternate') }}")
    with pytest.raises(ValueError, match=r"^the chat template refuses the row: roles must alternate$"):
        make(file=str(tmp_path / "strict.jinja")).encode({"messages": TALK})
    (tmp_path / "user.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"^the chat template leaves out what the assistant says: 'No\.'$"):
        make(file=str(tmp_path / "user.jinja")).encode({"messages": [TALK[0], {"role": "assistant", "content": "No."}]})
