"""Whether training samples are what they must be: text, tokens, where each turn starts and ends, and every weight.

`check_row` has a row encoded by the template under test and raises `Fault`, with the reason, where samples or refusal are
not those that `official_turns.py` works out.
"""

from __future__ import annotations

import json
import re
from typing import Any

from official_turns import (
    Renderer,
    Turn,
    Unrenderable,
    absent,
    followers,
    forms,
    reasons_aloud,
    turn_of,
    unheard,
    wanted,
    why_not,
)


class Fault(AssertionError):
    """A sample that is not what it must be."""


def demand(condition: Any, reason: str) -> None:
    if not condition:
        raise Fault(reason)


def check_row(renderer: Renderer, template: Any, row: dict[str, Any], defaults: dict[str, Any] | None = None) -> list[Any]:
    """Encode the row and check all of it. Returns the samples, none where the row was rightly refused."""
    try:
        samples = template.encode(row)
    except ValueError as err:
        check_refusal(renderer, row, str(err), defaults or {})
        return []
    check_samples(renderer, row, samples, defaults or {})
    for sample in samples:
        for k in sample.turns[-1:]:
            check_prompt(renderer, template, row, sample, k)
    return list(samples)


def check_refusal(renderer: Renderer, row: dict[str, Any], reason: str, defaults: dict[str, Any]) -> None:
    """A refusal names a reason, and every form of the row has one."""
    demand(reason.strip() and "\n" not in reason, f"the refusal is not one line: {reason!r}")
    if "image" in json.dumps(row["messages"]) and re.search("image|media|picture", reason):
        return
    kwargs = {**defaults, **row.get("chat_template_kwargs", {})}
    for form in forms(row["messages"], joined=False):
        demand(why_not(renderer, row, form, kwargs), f"refused without need: {reason!r}")


def check_samples(renderer: Renderer, row: dict[str, Any], samples: list[Any], defaults: dict[str, Any]) -> None:
    trained = sorted(turn for sample in samples for turn in sample.turns)
    demand(trained == wanted(row["messages"]), f"trained {trained}, not {wanted(row['messages'])}")
    for sample in samples:
        check_sample(renderer, row, sample, defaults)


def check_sample(renderer: Renderer, row: dict[str, Any], sample: Any, defaults: dict[str, Any] | None = None) -> None:
    """One sample: its text, its tokens, where each turn starts and ends, and each token's weight."""
    given = {**(defaults or {}), **row.get("chat_template_kwargs", {})}
    demand(given.items() <= sample.kwargs.items(), f"the arguments {given} are not in {sample.kwargs}")
    form, count = find_form(renderer, row, sample)
    demand(count == len(form) or sample.appended or "own-sample" in sample.notes, "a part of the row, and not reported")
    check_ids(renderer, row, sample, form, count)
    check_spans(renderer, row, sample, form, strict=not given)


def find_form(renderer: Renderer, row: dict[str, Any], sample: Any) -> tuple[list[dict[str, Any]], int]:
    """Which messages the sample's text renders, whole or up to a trained turn: the form and their number."""
    tools, passed = row.get("tools"), []
    for form in forms(row["messages"]):
        for count in dict.fromkeys([len(form), *(turn + 1 for turn in reversed(sample.turns))]):
            try:
                text = renderer.text(form[:count], tools, sample.kwargs)
            except Unrenderable:
                continue
            if sample.appended:
                body = sample.text.removesuffix(sample.appended)
                same = body != sample.text and body.rstrip() == text.rstrip() and text.startswith(body.rstrip())
            else:
                same = sample.text == text
            if same:
                for other in passed:
                    demand(why_not(renderer, row, other, sample.kwargs), "another form of the row comes first, and renders")
                return form, count
        passed.append(form)
    raise Fault(f"no rendering of the row has this text: {sample.text!r}")


def check_ids(renderer: Renderer, row: dict[str, Any], sample: Any, form: list[Any], count: int) -> None:
    if sample.appended:
        ids = list(renderer.tokenizer(sample.text, add_special_tokens=False)["input_ids"])
    else:
        ids = renderer.ids(form[:count], row.get("tools"), sample.kwargs)
    bos = renderer.tokenizer.bos_token_id
    doubled = bos is not None and sample.input_ids[:2] == [bos, bos] and ids[:2] != [bos, bos]
    demand(not doubled, "the first token is doubled")
    demand(list(sample.input_ids) == ids, "the tokens are not those of apply_chat_template(tokenize=True)")


def check_spans(renderer: Renderer, row: dict[str, Any], sample: Any, form: list[Any], strict: bool) -> None:
    tools = row.get("tools")
    demand(list(sample.turns) == sorted(sample.turns), "turns out of order")
    strict = strict and not any(reasons_aloud(message) for message in row["messages"] if message["role"] == "assistant")
    turns = [turn_of(renderer, form, tools, sample.kwargs, k) for k in sample.turns]
    spans = per_turn(sample, turns)
    mismatch = any(turn.mismatch for turn in turns)
    for (start, end), k, turn in zip(spans, sample.turns, turns, strict=True):
        trained = sample.text[start:end]
        starts = turn.starts[:-1] if turn.injected and strict else turn.starts
        if k == 0:  # nothing comes before: the header may be the model's to write
            starts = tuple(range(len(turn.text)))
        where = f"message {k}, trained {trained!r}"
        if start not in starts:
            raise Fault(f"{where}: starts at {start}, not at {starts[0]}: {turn.text[starts[0] :][:60]!r}")
        if turn.end is not None:
            demand(end == turn.end, f"{where}: ends at {end}, not at {turn.end}: {turn.trained[-60:]!r}")
            demand(sample.text[:end] == turn.text[:end], f"{where}: what stands before is not the turn's own rendering")
        else:
            check_borrowed_end(renderer, row, sample, form, k, turn, end)
        demand(trained == trained.rstrip(), f"{where}: whitespace after the end marker")
        lacking = absent(row["messages"][k], trained) or unheard(renderer, form, tools, sample.kwargs, k)
        demand(lacking is None, f"{where}: without {lacking!r}")
    demand(mismatch == ("prompt-mismatch" in sample.notes), f"prompt mismatch is {mismatch}, the notes say {sample.notes}")
    if strict:
        check_switch(renderer, row, sample, form)
    check_weights(renderer, row, sample, spans)


def per_turn(sample: Any, turns: list[Turn]) -> list[tuple[int, int]]:
    """The sample's spans, one a turn: those of turns that touch may have been given as one."""
    spans, found = sorted(sample.spans), []
    for turn, following in zip(turns, [*turns[1:], None], strict=True):
        demand(spans, f"{len(sample.spans)} spans for {len(turns)} turns")
        start, end = spans.pop(0)
        if following and turn.end and start < turn.end < end and turn.end in following.starts:
            spans.insert(0, (turn.end, end))
            end = turn.end
        found.append((start, end))
    demand(not spans, f"{len(sample.spans)} spans for {len(turns)} turns")
    return found


def check_borrowed_end(
    renderer: Renderer, row: dict[str, Any], sample: Any, form: list[Any], k: int, turn: Turn, end: int
) -> None:
    """The template writes no end for this turn: the next message's first marker ends it, in place or appended."""
    body = turn.text.rstrip()
    demand(sample.text.startswith(body), f"message {k}: what stands before is not the turn's own rendering")
    mark = sample.text[len(body) : end].strip()
    known = followers(renderer, form, row.get("tools"), sample.kwargs, k)
    demand(mark in known, f"message {k} ends with {mark!r}, not with one of {known}")
    if sample.appended and k == sample.turns[-1]:
        demand(sample.appended.strip() == mark and end == len(sample.text), f"appended {sample.appended!r}, trained {mark!r}")


def check_switch(renderer: Renderer, row: dict[str, Any], sample: Any, form: list[Any]) -> None:
    """Nothing stands between prompts and answers without reasoning, where thinking off, or the default, does that."""

    def clean(kwargs: dict[str, Any]) -> bool:
        try:
            turns = [turn_of(renderer, form, row.get("tools"), kwargs, k) for k in sample.turns if k]
        except Unrenderable:
            return False
        return not any(turn.mismatch or turn.injected for turn in turns)

    if not clean(sample.kwargs):
        for kwargs in ({}, {"enable_thinking": False}, {"thinking": False}):
            demand(not clean(kwargs), f"with {kwargs} the answer follows its prompt, with {sample.kwargs} it does not")


def check_weights(renderer: Renderer, row: dict[str, Any], sample: Any, found: list[tuple[int, int]]) -> None:
    """Exactly the tokens that begin inside a span are trained, with the weight of the message."""
    demand(len(sample.weights) == len(sample.input_ids), "weights and tokens differ in number")
    begins = token_begins(renderer.tokenizer, sample.input_ids, sample.text)
    pairs = zip(found, sample.turns, strict=True)
    given = {k: float(row["messages"][k].get("weight", 1)) for k in sample.turns}
    spans = [(_bytes(sample.text, start), _bytes(sample.text, end), given[k]) for (start, end), k in pairs]
    for index, (begin, weight) in enumerate(zip(begins, sample.weights, strict=True)):
        expected = next((value for start, end, value in spans if start <= begin < end), 0.0)
        if weight != expected:
            token = renderer.tokenizer.convert_ids_to_tokens(sample.input_ids[index])
            raise Fault(f"token {index} {token!r} has weight {weight}, not {expected}")


def check_prompt(renderer: Renderer, template: Any, row: dict[str, Any], sample: Any, k: int) -> None:
    """The prompt of inference is transformers' own, of the messages before the turn and the same arguments."""
    if not k:
        return
    expected = []
    for form in forms(row["messages"]):
        try:
            expected.append(renderer.ids(form[:k], row.get("tools"), sample.kwargs, prompt=True))
        except Unrenderable:
            continue
    got = template.prompt(row["messages"][:k], row.get("tools"), **sample.kwargs)
    demand(list(got) in expected, f"the prompt before message {k} is not transformers' own")


# --- tokens and text


def _bytes(text: str, at: int) -> int:
    return len(text[:at].encode())


def _byte_table() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character: itself, or one from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTES = _byte_table()


def token_begins(tokenizer: Any, ids: list[int], text: str) -> list[int]:
    """The byte of the text at which each token begins, from the bytes that the tokens spell.

    Where a tokenizer normalizes the text, so that they spell another, its own offsets are taken.
    """
    added = {number: token for token, number in tokenizer.get_added_vocab().items()}
    spelled, begins = bytearray(), []
    for number, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        begins.append(len(spelled))
        spelled += added[number].encode() if number in added else bytes(BYTES[letter] for letter in token)
    if bytes(spelled) != text.encode():
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        begins = [_bytes(text, start) for start, _ in offsets]
    return begins
