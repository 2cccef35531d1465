"""Takes the format of answers off a chat template: of the formats that fit its rendering of a probe, the one that reads it.

The constant text around a probe's names and arguments gives what stands before, between and after them. A template that
writes no calls is given the format that its text speaks of, else the most common one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from swift_core.types import AnswerDelta

from swift_plugin_transformers.answers import harmony, probes
from swift_plugin_transformers.answers.arguments import (
    Arguments,
    BracedArguments,
    JsonArguments,
    PythonArguments,
    TaggedArguments,
)
from swift_plugin_transformers.answers.calls import ARGUMENT_KEYS, HOLE, NAME_KEYS, CallFormat, NamedCall, ObjectCall
from swift_plugin_transformers.answers.harmony import Harmony
from swift_plugin_transformers.answers.probes import ARGUMENTS, IDS, NAMES, Rendered
from swift_plugin_transformers.answers.reader import AnswerFormat, Splitter, schemas
from swift_plugin_transformers.answers.text import Malformed, Text
from swift_plugin_transformers.markers import common_prefix, common_suffix
from swift_plugin_transformers.thinking import ANSWER, THINKING, THOUGHT

MARK = re.compile(r"[<\[][^<>\[\]\s]+[>\]]")
BRACKET = re.compile(r"[<\[]")
HERMES = CallFormat(ObjectCall(), before="<tool_call>\n", after="\n</tool_call>", separator="\n")
LFM = CallFormat(
    NamedCall("", PythonArguments()), "<|tool_call_start|>", closing="<|tool_call_end|>", separator=", ", brackets=("[", "]")
)
PHI = CallFormat(ObjectCall(), "<|tool_call|>", closing="<|/tool_call|>", separator=", ", brackets=("[", "]"))
GRANITE = CallFormat(ObjectCall(), "<|tool_call|>", separator=", ", brackets=("[", "]"))
KIMI = CallFormat(
    NamedCall(f":{HOLE}<|tool_call_argument_begin|>", JsonArguments()), "<|tool_calls_section_begin|>",
    "<|tool_call_begin|>functions.", "<|tool_call_end|>", closing="<|tool_calls_section_end|>",
)  # fmt: skip
DEEPSEEK = CallFormat(
    NamedCall("\n```json\n", JsonArguments()), "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    "\n```<｜tool▁call▁end｜>", "\n", "<｜tool▁calls▁end｜>",
)  # fmt: skip
MISTRAL = CallFormat(ObjectCall(), "[TOOL_CALLS]", separator=", ", brackets=("[", "]"))
INTERN = CallFormat(
    ObjectCall("name", "parameters", middle='", "parameters": '), before="<|action_start|><|plugin|>\n", after="<|action_end|>"
)
LLAMA = CallFormat(ObjectCall("name", "parameters", middle='", "parameters": '), "<|python_tag|>", separator="; ")
KNOWN = (KIMI, DEEPSEEK, LFM, PHI, GRANITE, MISTRAL, INTERN, LLAMA, HERMES)


def learn(template: Any) -> AnswerFormat:
    """The format of a template's answers."""
    plain = probes.plain(template)
    ends = _ends(template, plain)
    if plain and f"{harmony.CHANNEL}final{harmony.MESSAGE}{ANSWER}" in plain.whole:
        return AnswerFormat(Harmony(), "<|channel|>analysis<|message|>", "<|end|>", ends=harmony.ENDS)
    opening, closing, gap = _reasoning(template)
    one, two = probes.with_calls(template, 1), probes.with_calls(template, 2)
    lead, strip = _lead(template, plain, opening, closing)
    form = AnswerFormat(HERMES, opening, closing, lead, ends, learnt=False, strip=strip, gap=gap)
    form = replace(form, open_prompt=bool(opening) and probes.default_prompt(template).rstrip().endswith(opening))
    for calls in _candidates(one, two, form):
        prompted = calls.prompted and lead and not lead.startswith(calls.prompted)
        found = replace(form, calls=calls, learnt=True, lead=calls.prompted + lead if prompted else lead)
        extra = _extra_ends(one, found)
        found = replace(found, ends=(*ends, *(end for end in extra if end not in ends)))
        if one and reads(found, one, 1):
            return found
    return replace(form, calls=_declared(template))


def _ends(template: Any, plain: Rendered | None) -> tuple[str, ...]:
    """Marks that end a plain answer."""
    if plain is None or ANSWER not in plain.answer:
        return ()
    tail = plain.answer[plain.answer.rfind(ANSWER) + len(ANSWER) :]
    return tuple(dict.fromkeys([*template.markers.all(tail), *([plain.appended] if plain.appended else [])]))


def _extra_ends(one: Rendered | None, form: AnswerFormat) -> tuple[str, ...]:
    return (one.appended,) if one and one.appended and one.appended not in form.ends else ()


def _lead(template: Any, plain: Rendered | None, opening: str, closing: str) -> tuple[str, bool]:
    """What the template writes before a plain answer's content: marks, and whether there is white space."""
    if plain is None or ANSWER not in plain.answer:
        return "", False
    lead = plain.answer[: plain.answer.find(ANSWER)]
    if closing and closing in lead:
        lead = lead[lead.find(closing) + len(closing) :]
    return (lead, False) if lead.strip() else ("", bool(lead))


def _reasoning(template: Any) -> tuple[str, str, str]:
    """What opens and closes reasoning, and the white space between it and a call; empty where there is none."""
    found = ("", "")
    gap = ""
    for calls in (False, True):
        rendered = probes.reasoned(template, calls)
        if rendered is None or THOUGHT not in rendered.whole:
            continue
        at = rendered.whole.rfind(THOUGHT)
        before, after = rendered.whole[:at], rendered.whole[at + len(THOUGHT) :]
        marks = list(template.markers.pattern.finditer(before[-400:]))
        opening = before[-400:][marks[-1].start() :].strip() if marks else ""
        if not THINKING.search(opening):
            rest = rendered.prompt[template.markers.shared(rendered.prompt, rendered.whole) :].strip()
            opening = rest if THINKING.search(rest) else opening
        end = template.markers.pattern.search(after)
        closing = after[: end.end()].strip() if end else ""
        if not calls and ANSWER in after and (not closing or len(closing) > after.find(ANSWER) or ANSWER in closing):
            closing = after[: after.find(ANSWER)].strip()
        if opening and closing and found == ("", ""):
            found = (opening, closing)
        if calls and found[1] and found[1] in after:
            gap = after[after.find(found[1]) + len(found[1]) :]
            gap = gap[: len(gap) - len(gap.lstrip())]
    if found == ("", ""):
        prompt = probes.default_prompt(template).rstrip()
        source = template.renderer.source(probes.TOOLS)
        if prompt.endswith("<think>") or "</think>" in source:
            return "<think>", "</think>", "\n"
    return (*found, gap)


def _candidates(one: Rendered | None, two: Rendered | None, form: AnswerFormat) -> Iterator[CallFormat]:
    """Formats that fit what was rendered, the most exact first."""
    if one is None or NAMES[0] not in one.answer:
        return
    pair = two if two and all(name in two.answer for name in NAMES) else None
    rendered = pair or one
    texts = [rendered.answer]
    texts.append(_cut(rendered.answer, form))
    for answer in dict.fromkeys(reversed(texts)):
        rest = answer.removesuffix(rendered.appended) if rendered.appended else answer
        for find in (_objects, _named):
            found = find(rest, 2 if pair else 1)
            if found:
                call, spans = found
                yield from _around(rendered, rest, call, spans, form)


def _cut(answer: str, form: AnswerFormat) -> str:
    """An answer up to the mark that ends its turn."""
    last = max(answer.rfind(name) for name in NAMES)
    return answer[: min([at for end in form.ends if (at := answer.find(end, last)) >= 0], default=len(answer))]


Span = tuple[int, int]


def _objects(answer: str, count: int) -> tuple[ObjectCall, list[Span]] | None:
    """Calls that are JSON objects, and where they stand."""
    spans: list[Span] = []
    call = None
    for number in range(count):
        for at in [found.start() for found in re.finditer(r"\{", answer)]:
            if spans and at < spans[-1][1]:
                continue
            value, end = _decoded(answer, at)
            if not isinstance(value, dict):
                continue
            keys = {name: key for key, name in value.items() if isinstance(name, str)}
            name_key = keys.get(NAMES[number])
            own = [key for key, inner in value.items() if inner in (ARGUMENTS[number], json.dumps(ARGUMENTS[number]))]
            own += [key for key, inner in value.items() if isinstance(inner, str) and _is(inner, ARGUMENTS[number])]
            if name_key in NAME_KEYS and own and own[0] in ARGUMENT_KEYS:
                spans.append((at, end))
                call = call or _object_call(answer[at:end], name_key, own[0], value)
                break
    return (call, spans) if call and len(spans) == count else None


def _object_call(source: str, name_key: str, arguments_key: str, value: dict[str, Any]) -> ObjectCall:
    """The texts around name and arguments, with a hole for an id."""
    start = source.find(f'"{NAMES[0]}"') + 1
    after = start + len(NAMES[0])
    at = source.find("{", after)
    _, end = _decoded(source, at)
    tail = source[end:]
    for ident in IDS:
        tail = tail.replace(ident, HOLE)
    head = re.sub(r'(?<=: ")\d+(?=")', HOLE, source[:start])
    return ObjectCall(name_key, arguments_key, head, source[after:at], tail)


def _is(text: str, value: Any) -> bool:
    try:
        return bool(json.loads(text) == value)
    except ValueError:
        return False


def _decoded(text: str, at: int) -> tuple[Any, int]:
    try:
        return json.JSONDecoder().raw_decode(text, at)
    except ValueError:
        return None, at


def _named(answer: str, count: int) -> tuple[NamedCall, list[Span]] | None:
    """Calls that are a name, then arguments, and where they stand."""
    start = answer.find(NAMES[0])
    after = start + len(NAMES[0])
    found = _syntax(answer, after)
    if found is None:
        return None
    syntax, at, end = found
    spans, middle = [(start, end)], answer[after:at]
    if count == 2:
        second = answer.find(NAMES[1], end)
        again = _syntax_at(answer, second + len(NAMES[1]), syntax, ARGUMENTS[1]) if second >= 0 else None
        if again is None:
            return None
        spans.append((second, again[2]))
        middle = _hole(middle, answer[second + len(NAMES[1]) : again[1]])
    else:
        middle = re.sub(r"\d+", HOLE, middle) if re.search(r":\d", middle) else middle
    for ident in IDS:
        middle = middle.replace(ident, HOLE)
    return NamedCall(middle, syntax), spans


def _hole(middle: str, other: str) -> str:
    """The text between a name and its arguments, with a hole where it is another in the second call."""
    if middle == other:
        return middle
    start = common_prefix(middle, other)
    end = min(common_suffix(middle, other), len(middle) - start, len(other) - start)
    return middle[:start] + HOLE + middle[len(middle) - end :]


def _syntax(answer: str, after: int) -> tuple[Arguments, int, int] | None:
    """The syntax of the first probe's arguments, where they begin, and where they end."""
    for brace in [found.start() for found in re.finditer(r"\{", answer[after : after + 200])]:
        value, end = _decoded(answer, after + brace)
        if value == ARGUMENTS[0]:
            return JsonArguments(), after + brace, end
    braced = re.search(r"zqword:(\S+?)Zq1 tea é", answer[after : after + 200])
    if braced and answer.startswith("{", after):
        return _syntax_at(answer, after, BracedArguments(braced[1]), ARGUMENTS[0])
    if answer.startswith("(", after):
        return _syntax_at(answer, after, PythonArguments(), ARGUMENTS[0])
    tagged = _tags(answer, after)
    return _syntax_at(answer, after, tagged, ARGUMENTS[0]) if tagged else None


def _tags(answer: str, after: int) -> TaggedArguments | None:
    keys, values = list(ARGUMENTS[0]), ("Zq1 tea é", "7351", "7353]")
    places = []
    at = after
    for key, value in zip(keys, values, strict=True):
        start = answer.find(key, at)
        said = answer.find(value.rstrip("]") if value != "7353]" else "[7352", start)
        if start < 0 or said < 0:
            return None
        at = answer.find(value, said) + len(value)
        places.append((start, said, at))
    first, second, last = places
    middle = answer[first[0] + len(keys[0]) : first[1]]
    join, head, tail = answer[first[2] : second[0]], answer[after : first[0]], answer[last[2] :]
    opening = join[len(join) - common_suffix(join, head) :]
    found = re.search(r"<", opening)
    opening = opening[found.start() :] if found else opening.lstrip()
    closing = join[: common_prefix(join[: len(join) - len(opening)], tail)]
    closing = closing[: closing.rfind(">") + 1]
    if not middle.strip() or not closing.strip() or not opening.strip():
        return None
    return TaggedArguments(opening, middle, closing, join[len(closing) : len(join) - len(opening)])


def _syntax_at(answer: str, after: int, syntax: Arguments, wanted: dict[str, Any]) -> tuple[Arguments, int, int] | None:
    """Where arguments of a known syntax begin and end, where they are the probe's."""
    if isinstance(syntax, TaggedArguments):
        at = answer.find(syntax.opening, after)
    elif isinstance(syntax, PythonArguments):
        at = answer.find("(", after)
    else:
        at = answer.find("{", after)
    if at < 0:
        return None
    text = Text(held=answer[at:], closed=True)
    schema = next(each["function"]["parameters"] for each, own in zip(probes.TOOLS, ARGUMENTS, strict=True) if own == wanted)
    try:
        pieces = [piece for piece in syntax.read(text, schema) if piece]
    except (Malformed, ValueError):  # another syntax
        return None
    return (syntax, at, at + len(text.taken.rstrip())) if _is("".join(pieces), wanted) else None


def _around(
    rendered: Rendered, answer: str, call: ObjectCall | NamedCall, spans: list[Span], form: AnswerFormat
) -> Iterator[CallFormat]:
    """What stands around calls at these places: for each call, and once for all."""
    before, after = answer[: spans[0][0]], answer[spans[-1][1] :]
    if form.closing and form.closing in before:  # an empty thinking block
        before = before[before.rfind(form.closing) + len(form.closing) :]
    if len(spans) == 1:
        yield from _listed(CallFormat(call, "", before, after, many=False))
        yield from _listed(CallFormat(call, before, "", "", "", after, many=False))
        return
    between = answer[spans[0][1] : spans[1][0]]
    lead = before
    if isinstance(call, NamedCall) and not before.strip():
        lead = rendered.before[-40:] + before
    prefix = lead[len(lead) - common_suffix(lead, between) :]
    if found := BRACKET.search(prefix):
        prefix = prefix[found.start() :]
    prompted = prefix[: max(0, len(prefix) - len(before))]
    suffix = between[: common_prefix(between[: len(between) - len(prefix)], after)]
    cut = max(suffix.rfind(">"), suffix.rfind("]")) + 1
    suffix = suffix if suffix == after else suffix[:cut]
    separator = between[len(suffix) : len(between) - len(prefix)]
    opening = before[: max(0, len(before) - len(prefix))]
    closing = after[len(suffix) :]
    if prompted.strip():
        yield CallFormat(call, "", prefix, suffix, separator, closing, prompted=prompted)
        return
    yield from _listed(CallFormat(call, opening, prefix, suffix, separator, closing))


def _listed(form: CallFormat) -> Iterator[CallFormat]:
    """The format with a list's brackets told apart from the marks."""
    call = form.call
    if isinstance(call, NamedCall) and isinstance(call.syntax, TaggedArguments):
        form = replace(form, call=replace(call, syntax=replace(call.syntax, after=form.after or form.closing)))
    opening, closing = form.opening.rstrip(), form.closing.lstrip()
    if opening.endswith("[") and closing.startswith("]"):
        first, last = form.opening[len(opening) - 1 :], form.closing[: len(form.closing) - len(closing) + 1]
        yield replace(form, opening=opening[:-1], closing=closing[1:], brackets=(first, last))
    elif opening.endswith("[") and form.before == "":
        return
    yield form


def reads(form: AnswerFormat, rendered: Rendered, count: int) -> bool:
    """Whether a probe's calls are read back from the template's own rendering."""
    calls, rest = read_back(form, replace(rendered, answer=_cut(rendered.answer, form)))
    wanted = [(NAMES[number], ARGUMENTS[number]) for number in range(count)]
    return calls == wanted and not rest.strip()


def read_back(form: AnswerFormat, rendered: Rendered) -> tuple[list[tuple[str, Any]], str]:
    """The calls of a rendered answer, and its content."""
    text = Text(schemas(probes.TOOLS))
    splitter = Splitter(text, form, rendered.before)
    text.held, text.closed = text.held + rendered.answer, True
    names, arguments, content = [], [""] * 9, ""
    for delta in splitter.run():
        delta = delta or AnswerDelta()
        names += [delta.name] if delta.name else []
        content += delta.content
        if delta.call is not None:
            arguments[delta.call] += delta.arguments
    try:
        return [(name, json.loads(arguments[number])) for number, name in enumerate(names)], content
    except ValueError:
        return [], content


def _declared(template: Any) -> CallFormat:
    """The format of a template that writes no calls: one whose mark its text or its tokenizer has, else the common one."""
    source = template.renderer.source(probes.TOOLS)
    added = {token.content for token in getattr(template.tokenizer, "added_tokens_decoder", {}).values()}
    for form in KNOWN:
        marks = MARK.findall(form.opening + form.before + form.closing)
        if all(mark in source for mark in marks) or ("tools" in source and all(mark in added for mark in marks)):
            return form
    return HERMES
