"""The mask rule on small templates of our own, each with one habit that official templates have.

What is expected is written by hand: the trained text of each turn, the notes, the template arguments, the end marker added.
"""

from __future__ import annotations

from typing import Any

import pytest
from swift_core.config import build_options
from swift_core.errors import RequestError
from swift_core.types import Row, Sample
from swift_plugin_transformers.chat import ChatTemplate
from swift_plugin_transformers.config import ChatTemplateConfig
from swift_plugin_transformers.markers import Markers
from swift_plugin_transformers.testing import make_tokenizer
from swift_plugin_transformers.thinking import switches

IM = "<|im_end|>"
TALK: list[Row] = [
    {"role": "user", "content": "Fine?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Yes."},
    {"role": "assistant", "content": "Yes."},
]


def call(name: str, arguments: Any, ident: str = "call00001") -> Row:
    return {"id": ident, "type": "function", "function": {"name": name, "arguments": arguments}}


def asking(*calls: Row, content: str | None = None, **more: Any) -> list[Row]:
    return [TALK[0], {"role": "assistant", "content": content, "tool_calls": list(calls), **more}]


def chat(assistant: str, prompt: str, before: str = "", after: str = "") -> str:
    """A template: ChatML for all but the assistant's messages."""
    return (
        f"{before}{{%- for m in messages %}}{{%- if m.role == 'assistant' %}}{assistant}"
        "{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
        f"{{%- if add_generation_prompt %}}{prompt}{{%- endif %}}{after}"
    )


HEAD = "{{- '<|im_start|>assistant\\n' }}"
PLAIN = HEAD + "{{- m.content + '<|im_end|>\\n' }}"


def make(source: str, **options: Any) -> ChatTemplate:
    config = build_options(ChatTemplateConfig, {"jinja": source, **options}, "template.checkpoint")
    assert config is not None
    return ChatTemplate(make_tokenizer(), config)


def spans(sample: Sample) -> list[str]:
    return [sample.text[start:end] for start, end in sample.spans]


def only(source: str, messages: list[Row], **options: Any) -> Sample:
    """The one sample of a row; its text is transformers' own rendering, and its trained tokens are its spans."""
    template = make(source, **options)
    (sample,) = template.encode({"messages": messages})
    text = template.tokenizer.apply_chat_template(messages, tokenize=False, chat_template=source, **sample.kwargs)
    assert sample.text == (text.rstrip() + sample.appended if sample.appended else text)
    ids = [token for token, weight in zip(sample.input_ids, sample.weights, strict=True) if weight]
    assert template.tokenizer.decode(ids) == "".join(spans(sample))
    return sample


# --- where a turn ends


def test_a_generation_prompt_that_is_always_written_is_never_trained() -> None:
    """Command R7B and Firefunction write one after every conversation. Its opening marker opens the next message too, so the
    common prefix with a continuation holds it; the marker before it is the end of the turn."""
    source = (
        "{%- for m in messages %}{{- '<|open|><|' + m.role + '|>' + m.content + '<|shut|>' }}{%- endfor %}"
        "{{- '<|open|><|assistant|>' }}"
    )
    assert spans(only(source, TALK)) == ["Yes.<|shut|>"] * 2
    # One marker alone is an end marker, also where a generation prompt follows it.
    source = "{%- for m in messages %}{{- '<|' + m.role + '|>' + m.content + '<|shut|>' }}{%- endfor %}{{- '<|assistant|>' }}"
    assert spans(only(source, TALK)) == ["Yes.<|shut|>"] * 2


def test_an_end_in_two_markers_is_trained_whole() -> None:
    """Cohere closes the response, then the turn; neither is taken for the opening of a message."""
    answer = "{{- '<|open|><|assistant|><|START_RESPONSE|>' + m.content + '<|END_RESPONSE|><|shut|>' }}"
    source = (
        f"{{%- for m in messages %}}{{%- if m.role == 'assistant' %}}{answer}{{%- else %}}"
        "{{- '<|open|><|' + m.role + '|>' + m.content + '<|shut|>' }}{%- endif %}{%- endfor %}{{- '<|open|><|assistant|>' }}"
    )
    assert spans(only(source, TALK)) == ["<|START_RESPONSE|>Yes.<|END_RESPONSE|><|shut|>"] * 2


@pytest.mark.parametrize("content", [">", "end", "<|im_end|", "Yes.<|im_start|>user\nYes.", "  \n", "x", "|>"])
def test_an_answer_that_looks_like_a_marker_ends_where_it_ends(content: str) -> None:
    sample = only(chat(PLAIN, HEAD), [TALK[0], {"role": "assistant", "content": content}])
    assert spans(sample) == [content + IM]
    assert sample.appended is None


def test_a_tool_call_that_the_template_leaves_open_ends_where_its_result_begins() -> None:
    """Gemma 4 runs call, result and answer into one turn: generation stops where the result opens."""
    calls = "{%- for c in m.tool_calls or [] %}{{- '<|tool_call>' + c.function.name + '<tool_call|>' }}{%- endfor %}"
    source = (
        "{%- for m in messages %}{%- if m.role == 'tool' %}{{- '<|tool_response>' + m.content + '<tool_response|>' }}"
        "{%- else %}{%- if not (loop.index0 and loop.previtem.role == 'tool') %}{{- '<|turn>' + m.role + '\\n' }}{%- endif %}"
        "{{- m.content or '' }}" + calls + "{%- if not m.tool_calls %}{{- '<turn|>\\n' }}{%- endif %}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt and messages[-1].role != 'tool' %}{{- '<|turn>assistant\\n' }}{%- endif %}"
    )
    messages = asking(call("look", {}))
    assert (spans(only(source, messages)), only(source, messages).appended) == (
        ["<|tool_call>look<tool_call|><|tool_response>"], "<|tool_response>"
    )  # fmt: skip
    messages += [{"role": "tool", "content": "x", "tool_call_id": "call00001"}, {"role": "assistant", "content": "Done."}]
    whole = only(source, messages)
    assert (spans(whole), whole.appended) == (["<|tool_call>look<tool_call|><|tool_response>", "Done.<turn|>"], None)


def test_an_answer_that_the_template_does_not_close_is_refused_where_others_are_closed() -> None:
    """Seed-OSS writes its end marker with the content only: an empty answer would never end."""
    source = chat(HEAD + "{%- if m.content %}{{- m.content + '<|im_end|>\\n' }}{%- endif %}", HEAD)
    with pytest.raises(
        ValueError, match=r"^message 1: the chat template writes no end marker after it, as it does after other"
    ):
        make(source).encode({"messages": [TALK[0], {"role": "assistant", "content": ""}]})


# --- where a turn starts


def test_an_answer_may_begin_as_the_prompt_goes_on() -> None:
    """Apriel's prompt has words of its own that the rendered answer lacks; the common prefix must not eat the answer's."""
    source = chat(PLAIN, HEAD + "{{- 'Here are my reasoning steps:\\n' }}")
    for content in ("Here you are.", "Here are my reasoning steps:", "There."):
        sample = only(source, [TALK[0], {"role": "assistant", "content": content}])
        assert (spans(sample), sample.notes) == ([content + IM], ["prompt-mismatch"])


def test_a_prompt_that_differs_in_an_earlier_message_does_not_train_that_message() -> None:
    """Mistral Nemo writes the system message into a closing user message only: text and prompt part ways in the question."""
    source = (
        "{%- for m in messages %}{%- if m.role == 'user' %}{{- '[INST]' }}"
        "{%- if loop.last and messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}"
        "{{- m.content + '[/INST]' }}{%- elif m.role == 'assistant' %}{{- m.content + '</s>' }}{%- endif %}{%- endfor %}"
    )
    sample = only(source, [{"role": "system", "content": "Be brief."}, *TALK])
    assert spans(sample) == ["Yes.</s>"] * 2
    assert set(sample.notes) == {"prompt-mismatch"}


@pytest.mark.parametrize("opening", ["<think>\\n", "<think>\\n</think>"])
def test_a_marker_is_never_cut(opening: str) -> None:
    """`<think>` and `</think>` share a character, and so may the answer."""
    answer = HEAD + "{{- m.content + '<|im_end|>\\n' }}"
    source = chat(answer, HEAD + "{{- '" + opening + "' }}")
    sample = only(source, [TALK[0], {"role": "assistant", "content": "<thimble>"}])
    assert (spans(sample), sample.notes) == ([f"<thimble>{IM}"], ["prompt-mismatch"])
    markers = Markers()
    assert markers.shared("a<think>b", "a</think>b") == 1
    assert markers.shared("[INST]a", "[/INST]a") == 0
    assert markers.shared("]~b]ai", "]~b]user") == 4
    assert markers.shared("[|user|]", "[|assistant|]") == 0


# --- thinking


def thinking(close: str, field: str = "{{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}") -> str:
    return chat(HEAD + field + "{{- m.content + '<|im_end|>\\n' }}", HEAD + close)


SWITCHES = {
    "enable_thinking": "{%- if enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}",
    "thinking": "{%- if thinking is defined and not thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}",
    "reasoning_effort": "{%- if reasoning_effort == 'none' %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}",
}


@pytest.mark.parametrize(("name", "value"), [("enable_thinking", False), ("thinking", False), ("reasoning_effort", "none")])
def test_any_thinking_switch_is_found_and_turned_off_for_plain_rows(name: str, value: Any) -> None:
    source = thinking(SWITCHES[name])
    sample = only(source, TALK)
    assert (spans(sample), sample.kwargs, sample.notes) == ([f"Yes.{IM}"] * 2, {name: value}, [])
    assert value in switches(source)[name]
    template = make(source)
    prompt = template.prompt(TALK[:3], **sample.kwargs)
    assert sample.input_ids[: len(prompt)] == prompt
    # A row with reasoning keeps the template's default, and so does one whose owner chose a value.
    thought = only(source, [TALK[0], {**TALK[1], "reasoning_content": "Hm."}])
    assert (spans(thought), thought.kwargs) == ([f"<think>\nHm.\n</think>\n\nYes.{IM}"], {})
    own = only(source, TALK[:2], kwargs={name: True})
    assert (spans(own), own.kwargs, own.notes) == ([f"Yes.{IM}"], {name: True}, ["thinking-block"])


def test_an_injected_block_that_no_switch_avoids_has_weight_0() -> None:
    sample = only(thinking(""), TALK)
    assert (spans(sample), sample.kwargs, set(sample.notes)) == ([f"Yes.{IM}"] * 2, {}, {"thinking-block"})
    assert sample.text.count("<think>\n\n</think>\n\nYes.") == 2
    # Also where the prompt opens the block, and the rendering closes it at once.
    sample = only(thinking("{{- '<think>\\n' }}"), TALK)
    assert (spans(sample), set(sample.notes)) == ([f"Yes.{IM}"] * 2, {"thinking-block"})
    # Blanks with which the answer begins are its own.
    sample = only(thinking(""), [TALK[0], {"role": "assistant", "content": "  Yes."}])
    assert spans(sample) == [f"  Yes.{IM}"]


def test_a_template_whose_plain_prompt_leaves_thinking_to_the_model_has_it_turned_off() -> None:
    """SmolLM3: with thinking on, prompt and text agree without a block; a plain answer there would teach it not to think."""
    block = "{{- '<think>\\n\\n</think>\\n' if enable_thinking is defined and not enable_thinking else '' }}"
    sample = only(chat(HEAD + block + "{{- m.content + '<|im_end|>\\n' }}", HEAD + block), TALK)
    assert (spans(sample), sample.kwargs, sample.notes) == ([f"Yes.{IM}"] * 2, {"enable_thinking": False}, [])


def test_thinking_is_never_turned_on_for_plain_rows() -> None:
    """Gemma 4's default prompt closes an empty block that the rendered answer lacks. Thinking on would make the two agree,
    with answers that do not think."""
    field = "{%- if m.reasoning_content %}{{- '<|channel>thought\\n' + m.reasoning_content + '<channel|>' }}{%- endif %}"
    close = "{%- if not enable_thinking | default(false) %}{{- '<|channel>thought\\n<channel|>' }}{%- endif %}"
    sample = only(thinking(close, field), TALK)
    assert (spans(sample), sample.kwargs, set(sample.notes)) == ([f"Yes.{IM}"] * 2, {}, {"prompt-mismatch"})
    # With reasoning, it is the value with which the prompt leads to the thoughts.
    thought = only(thinking(close, field), [TALK[0], {**TALK[1], "reasoning_content": "Hm."}])
    assert (thought.kwargs, thought.notes) == ({"enable_thinking": True}, [])
    assert spans(thought) == [f"<|channel>thought\nHm.<channel|>Yes.{IM}"]


def test_markers_that_are_too_general_alone_are_taken_with_their_neighbours() -> None:
    """Kimi K3 writes tags as `<|open|>think<|sep|>`: a response that is empty is no thought."""
    tag = "{{- '<|open|>response<|sep|>' + m.content + '<|close|>response<|sep|><|close|>message<|sep|>' }}"
    thought = (
        "{%- if thinking is undefined or thinking %}"
        "{{- '<|open|>think<|sep|>' + (m.reasoning_content or '') + '<|close|>think<|sep|>' }}{%- endif %}"
    )
    opening = "{{- '<|open|>' + ('think' if thinking is undefined or thinking else 'response') + '<|sep|>' }}"
    source = chat(HEAD + thought + tag, HEAD + opening)
    end = "<|close|>response<|sep|><|close|>message<|sep|>"
    for content in ("Yes.", ""):
        sample = only(source, [TALK[0], {"role": "assistant", "content": content}])
        assert (spans(sample), sample.kwargs, sample.notes) == ([content + end], {"thinking": False}, [])


# --- tool calls


def with_calls(arguments: str, many: str = "m.tool_calls or []") -> str:
    tags = f"{{%- for c in {many} %}}{{{{- '<call>' + c.function.name }}}}{arguments}{{{{- '</call>' }}}}{{%- endfor %}}"
    return chat(HEAD + "{{- m.content or '' }}" + tags + "{{- '<|im_end|>\\n' }}", HEAD)


def test_arguments_take_the_form_that_the_template_needs() -> None:
    given = {"city": "Köln", "days": 2, "deep": {"a": [True, None]}}
    text = '{"city": "Köln", "days": 2, "deep": {"a": [true, null]}}'
    for arguments in ("{{- c.function.arguments | tojson }}", "{{- c.function.arguments }}"):
        for held in (given, text):  # a row may hold them as text: they are an object all the same
            (sample,) = make(with_calls(arguments)).encode({"messages": asking(call("look", held))})
            assert spans(sample) == [f"<call>look{text}</call>{IM}"]


def test_arguments_that_no_form_renders_rightly_are_refused() -> None:
    strict = "{%- if c.function.arguments is not string %}{{ raise_exception('text, please') }}{%- endif %}"
    with pytest.raises(ValueError, match=r"^the chat template quotes the arguments of the tool call 'look' twice$"):
        make(with_calls(strict + "{{- c.function.arguments | tojson }}")).encode({"messages": asking(call("look", {"a": "b"}))})
    python = "{%- if c.function.arguments is string %}{{ raise_exception('no text') }}{%- endif %}{{- c.function.arguments }}"
    with pytest.raises(
        ValueError, match=r"^the chat template writes the arguments of the tool call 'look' as Python, not as J"
    ):
        make(with_calls(python)).encode({"messages": asking(call("look", {"a": "b"}))})


JSON = "{{- c.function.arguments | tojson }}"


@pytest.mark.parametrize(
    ("source", "messages", "what"),
    [
        (chat(PLAIN, HEAD), [TALK[0], {**TALK[1], "reasoning_content": "Hm, hm."}], "the reasoning 'Hm, hm.'"),
        (with_calls(JSON, "(m.tool_calls or [])[:1]"), asking(call("look", {"a": "b"}), call("see", {}, "call00002")), "'see'"),
        # The same call twice, of which the template writes one: nothing that can be looked for tells.
        (with_calls(JSON, "(m.tool_calls or [])[:1]"), asking(*[call("look", {"a": "b"})] * 2), "'look'"),
        (with_calls(""), asking(call("look", {"city": "a"})), "the argument city of the tool call look"),
        (with_calls("{{- c.function.arguments.a }}"), asking(call("look", {"a": "b", "day": "b"})), "the argument day of"),
        # Content beside a call, and hidden in its name.
        (with_calls(JSON).replace("m.content or ''", "''"), asking(call("look", {"a": "b"}), content="look"), "'look'"),
        (chat(PLAIN.replace("m.content", "m.content[:4]"), HEAD), [TALK[0], {**TALK[1], "content": "Yes. No."}], "'Yes. No.'"),
    ],
)  # fmt: skip
def test_what_the_template_leaves_out_is_named(source: str, messages: list[Row], what: str) -> None:
    with pytest.raises(ValueError, match=r"^the chat template leaves out what the assistant says: ") as caught:
        make(source).encode({"messages": messages})
    assert what in str(caught.value)


def test_a_turn_that_is_not_trained_need_not_be_rendered() -> None:
    messages = [*asking(call("look", {})), *TALK]
    messages[1]["train"] = False
    sample = make(chat(PLAIN.replace("m.content", "(m.content or '')"), HEAD)).encode({"messages": messages})[0]
    assert (sample.turns, spans(sample)) == ([3, 5], [f"Yes.{IM}"] * 2)


# --- marks of the template's own, and where templates come from


MARKED = HEAD + "{%- generation %}{{- m.content + '<|im_end|>\\n' }}{%- endgeneration %}"


def test_generation_marks_are_checked_and_the_rule_wins() -> None:
    right = only(chat(MARKED, HEAD), TALK)
    assert (spans(right), right.notes) == ([f"Yes.{IM}"] * 2, [])
    wrong = only(chat(HEAD + "{%- generation %}{{- m.content }}{%- endgeneration %}{{- '<|im_end|>\\n' }}", HEAD), TALK)
    assert (spans(wrong), wrong.notes) == ([f"Yes.{IM}"] * 2, ["generation-marks"])


def test_named_variants() -> None:
    """transformers picks `tool_use` where there are tools, else `default`; `template.variant` picks one for all rows."""
    tokenizer = make_tokenizer()
    names = {"default": "D", "tool_use": "T", "rag": "R"}
    tokenizer.chat_template = {name: chat(PLAIN, HEAD, "{{- '<" + mark + ">' }}") for name, mark in names.items()}
    tools = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]
    template = ChatTemplate(tokenizer, ChatTemplateConfig())
    for given, mark in ((None, "<D>"), ([], "<D>"), (tools, "<T>")):
        (sample,) = template.encode({"messages": TALK[:2], "tools": given})
        assert sample.text.startswith(mark)
        assert spans(sample) == [f"Yes.{IM}"]
    (chosen,) = ChatTemplate(tokenizer, ChatTemplateConfig(variant="rag")).encode({"messages": TALK[:2], "tools": tools})
    assert chosen.text.startswith("<R>")
    with pytest.raises(RequestError, match=r"template\.variant: .* no chat template 'fim'; it has: default, rag, tool_use$"):
        ChatTemplate(tokenizer, ChatTemplateConfig(variant="fim"))
    del tokenizer.chat_template["default"]
    with pytest.raises(RequestError, match=r"Choose one with template\.variant\.$"):
        ChatTemplate(tokenizer, ChatTemplateConfig()).encode({"messages": TALK[:2]})


def test_templates_in_files_beside_the_tokenizer(tmp_path: Any) -> None:
    """`chat_template.jinja` and `additional_chat_templates/`, as transformers writes and reads them; older multimodal
    checkpoints have `chat_template.json`."""
    from transformers import AutoTokenizer

    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": chat(PLAIN, HEAD, "{{- '<D>' }}"), "tool_use": chat(PLAIN, HEAD, "{{- '<T>' }}")}
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").is_file()
    assert (tmp_path / "additional_chat_templates" / "tool_use.jinja").is_file()
    template = ChatTemplate(AutoTokenizer.from_pretrained(tmp_path), ChatTemplateConfig())
    assert template.encode({"messages": TALK[:2]})[0].text.startswith("<D>")
    assert template.encode({"messages": TALK[:2], "tools": [{"type": "function"}]})[0].text.startswith("<T>")

    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").unlink()
    (tmp_path / "chat_template.json").write_text(
        '{"chat_template": "' + "{% for m in messages %}[{{ m.role }}]{% endfor %}" + '"}'
    )
    template = ChatTemplate(AutoTokenizer.from_pretrained(tmp_path), ChatTemplateConfig())
    assert template.tokenizer.decode(template.prompt(TALK[:2])) == "[user][assistant]"
    (tmp_path / "chat_template.json").write_text("{}")
    with pytest.raises(RequestError, match=r"chat_template\.json: no chat template can be read from it"):
        ChatTemplate(AutoTokenizer.from_pretrained(tmp_path), ChatTemplateConfig())


def test_a_broken_template_is_refused_at_once(tmp_path: Any) -> None:
    with pytest.raises(RequestError, match=r"^template\.jinja: line 2 of the chat template: "):
        make("{% for m in messages %}\n{% endif %}")
    with pytest.raises(RequestError, match=r"^template\.file and template\.jinja exclude each other; give one$"):
        make("x", file="y")
    (tmp_path / "latin.jinja").write_bytes(b"\xe9\xff")
    with pytest.raises(RequestError, match=r"latin\.jinja is not UTF-8 text$"):
        make("", file=str(tmp_path / "latin.jinja"))


def test_a_tokenizer_without_offsets_is_refused_in_one_line() -> None:
    class Slow:
        is_fast, chat_template, all_special_tokens = False, chat(PLAIN, HEAD), ["<|im_end|>"]

        def __init__(self) -> None:
            self.inner = make_tokenizer()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    with pytest.raises(RequestError, match=r"^the mask needs a fast tokenizer, one with a tokenizer\.json"):
        ChatTemplate(Slow(), ChatTemplateConfig(jinja=chat(PLAIN, HEAD))).encode({"messages": TALK})


# --- what ends generation


def test_stop_ids_are_the_ends_of_an_answer_and_of_a_call() -> None:
    """As GLM's: the header of the next message, which is a token of its own; `</call>` ends a part only."""
    tokenizer = make_tokenizer()
    names = ["<|user|>", "<|observation|>", "<call>", "</call>"]
    tokenizer.add_tokens(names[:2], special_tokens=True)
    tokenizer.add_tokens(names[2:])
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(names), strict=True))
    source = (
        "{%- for m in messages %}{%- if m.role == 'tool' %}{{- '<|observation|>' + m.content }}{%- else %}"
        "{{- '<|' + m.role + '|>' + (m.content or '') }}{%- for c in m.tool_calls or [] %}"
        "{{- '<call>' + c.function.name + (c.function.arguments | tojson) + '</call>' }}{%- endfor %}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
    )
    template = ChatTemplate(tokenizer, ChatTemplateConfig(jinja=source))
    assert template.stop_ids() == sorted([tokenizer.eos_token_id, ids["<|user|>"], ids["<|observation|>"]])
    # A marker that is several tokens cannot stop generation: its last one stands elsewhere too.
    assert make(source).stop_ids() == [tokenizer.eos_token_id]
    # A template without tool calls has the end of an answer alone.
    assert make(chat(PLAIN, HEAD)).stop_ids() == [tokenizer.eos_token_id]


def test_the_fingerprint_changes_with_tokenizer_and_template() -> None:
    def of(template: str | None = None, token: str | None = None, **options: Any) -> str:
        tokenizer = make_tokenizer()
        if template:
            tokenizer.chat_template = template
        if token:
            tokenizer.add_tokens([token])
        return ChatTemplate(tokenizer, ChatTemplateConfig(**options)).fingerprint()

    assert of() == of()
    source = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    assert len({of(), of(source), of(token="<new>"), of(jinja=source)}) == 4
