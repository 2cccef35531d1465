"""Recognises the row shapes in common use by their keys, and maps them to the standard row.

Pure functions. Nothing is guessed where two readings are possible: the row is refused and the setting that decides is
named. Keys that no shape uses stay on the row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from swift_plugin_huggingface.media import place, read_media
from swift_plugin_huggingface.messages import Message, RowFault, decode, kind, read_messages, read_tools

Row = dict[str, Any]

CONVERSATIONS = ("messages", "conversations", "conversation")
PARTNERS = {
    "query": "response",
    "prompt": "completion",
    "instruction": "output",
    "question": "answer",
    "problem": "solution",
    "input": "output",
}
"""Keys that hold what the user says -> the key that usually holds the answer."""
ANSWERS = ("response", "completion", "output", "answer", "solution")
SYSTEMS = ("system", "system_prompt")
REJECTED = ("rejected", "rejected_response", "rejected_messages")
OBJECTS = "objects"  # what grounding data name in the text, and where it stands in the pictures
NOTES = "media_notes"  # what was done to a row's media, for the template to pass on
SHAPES = (
    "messages (or conversations), instruction/input/output, query/response/history, prompt/completion, question/answer, "
    "problem/solution, chosen/rejected, text"
)


@dataclass(frozen=True)
class Shape:
    """Where a row's conversation stands: in the list `conversation`, in the document `text`, or in a pair of keys."""

    conversation: str | None = None
    text: str | None = None
    question: str | None = None
    context: str | None = None  # joined to the question: Alpaca's input
    answer: str | None = None


def standard_row(row: Row, form: str = "auto", system: str | None = None) -> Row:
    """The standard row of `row`.

    form: a name of `config.Format`. system: a system message for rows that have none.
    `rejected`, where there is one, is a whole conversation: it begins as `messages` does and ends with the other answer.
    Raises RowFault with the reason to refuse the row.
    """
    rest = {key: value for key, value in row.items() if value is not None}
    shape = find_shape(rest, form)
    question, prompt = _question(rest, shape), None
    messages, answer_key = question, "chosen" if "chosen" in rest else shape.answer
    if answer_key:
        # `solution` stays on the row as well: rewards read it there
        answer = _answer(rest[answer_key] if answer_key == "solution" else rest.pop(answer_key), answer_key)
        messages = _continue(question, answer, answer_key)
        prompt = question if answer[0]["role"] == "assistant" else None
    rejected = _rejected(rest, messages, prompt)
    if form == "preference" and rejected is None:
        raise _wrong_form(row, form, "rejected")
    system_key = next((key for key in SYSTEMS if key in rest), None)
    if system_key and (own := _text(rest.pop(system_key), system_key)):
        first = messages[0]
        if first["role"] == "system" and first["content"] != own:
            raise RowFault(f"{system_key!r} and the first message are two different system messages; keep one")
        system = own
    conversations = [("messages", _with_system(messages, system))]
    if rejected is not None:
        conversations.append(("rejected", _with_system(rejected, system)))
    standard, notes = place(conversations, read_media(rest))
    if notes:
        standard[NOTES] = notes
    tools = read_tools(rest.pop("tools", None))
    if tools:
        standard["tools"] = tools
    # a forced format may leave a `messages` column that it did not read: the standard keys stand
    return {**standard, **{key: value for key, value in _columns(rest).items() if key not in standard}}


def find_shape(row: Row, form: str = "auto") -> Shape:
    """The shape of a row, by its keys. Raises RowFault where none fits, or more than one."""
    conversation = next((key for key in CONVERSATIONS if key in row), None)
    if form in ("messages", "sharegpt"):
        if not conversation:
            raise _wrong_form(row, form, "messages" if form == "messages" else "conversations")
        return Shape(conversation=conversation)
    if form == "text":
        if "text" not in row:
            raise _wrong_form(row, form, "text")
        return Shape(text="text")
    preferred = "chosen" in row
    if form in ("auto", "preference"):
        if conversation:
            return Shape(conversation=conversation)
        question = _find_question(row)
        if question is None and preferred:
            return Shape()
        if question is None and "text" in row:
            return Shape(text="text")
        if question is None:
            raise RowFault(
                f"unrecognised row; keys found: {', '.join(map(str, row)) or 'none'}. Known shapes: {SHAPES} "
                "(or map your keys: dataset.columns.KEY=query)"
            )
    else:
        question = "instruction" if form == "alpaca" else form
        if question not in row:
            raise _wrong_form(row, form, question)
    answer = None if preferred else _find_answer(row, question)
    contexts = ("input", "context") if question == "instruction" else ()
    return Shape(question=question, context=next((key for key in contexts if key in row), None), answer=answer)


def _wrong_form(row: Row, form: str, key: str) -> RowFault:
    return RowFault(f"not a row of format {form}: no {key!r}; keys found: {', '.join(map(str, row)) or 'none'}")


def _find_question(row: Row) -> str | None:
    found = [key for key in PARTNERS if key in row and not (key == "input" and "instruction" in row)]
    paired = [key for key in found if PARTNERS[key] in row]
    chosen = paired if len(paired) == 1 else found
    if len(chosen) > 1:
        names = " and ".join(map(repr, chosen))
        raise RowFault(f"{names} could both be the question; choose with dataset.format, or rename with dataset.columns")
    return chosen[0] if chosen else None


def _find_answer(row: Row, question: str) -> str | None:
    if PARTNERS[question] in row:
        return PARTNERS[question]
    found = [key for key in ANSWERS if key in row]
    chosen = [key for key in found if key != "solution"] or found
    if len(chosen) > 1:
        names = " and ".join(map(repr, chosen))
        raise RowFault(f"{names} could both be the answer; choose with dataset.format, or rename with dataset.columns")
    return chosen[0] if chosen else None


def _question(rest: Row, shape: Shape) -> list[Message]:
    """The conversation up to the answer, or all of it where the shape is a list of messages. Pops what it uses."""
    if shape.conversation:
        return read_messages(rest.pop(shape.conversation), shape.conversation)
    if shape.text:
        return [{"role": "assistant", "content": _text(rest.pop(shape.text), shape.text)}]
    if not shape.question:
        return []
    history = _history(rest.pop("history", None))
    value = rest.pop(shape.question)
    if isinstance(value, list):
        return history + read_messages(value, shape.question)
    parts = [_text(value, shape.question)]
    if shape.context:
        parts.append(_text(rest.pop(shape.context), shape.context))
    return [*history, {"role": "user", "content": "\n".join(part for part in parts if part)}]


def _history(value: Any) -> list[Message]:
    """Earlier turns: a list of [question, answer] pairs, or of messages."""
    value = decode(value)
    if value in (None, "", []):
        return []
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return read_messages(value, "history")
    if not isinstance(value, list):
        raise RowFault(f"history must be a list of [question, answer] pairs, not {kind(value)}")
    messages = []
    for number, pair in enumerate(value):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise RowFault(f"history[{number}] must be a pair [question, answer]")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": _text(text, f"history[{number}]")})
    return messages


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowFault(f"{name} must be text, not {kind(value)}")
    return value


def _answer(value: Any, name: str) -> list[Message]:
    """An answer as messages: from text, a message, or a list of them, which may be a whole conversation."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise RowFault(f"{name} must be text or messages, not {kind(value)}")
    return read_messages(value, name)


def _continue(question: list[Message], answer: list[Message], name: str) -> list[Message]:
    """Question and answer as one conversation. An answer that begins with a question is a whole conversation already."""
    if answer[0]["role"] == "assistant":
        if question and question[-1]["role"] == "assistant":
            raise RowFault(f"the conversation ends with an answer already; with {name!r} it must end before it")
        return question + answer
    plain, whole = ([message for message in part if message["role"] != "system"] for part in (question, answer))
    if whole[: len(plain)] != plain:
        raise RowFault(f"{name!r} is a whole conversation, and begins otherwise than the question of the row")
    return answer


def _rejected(rest: Row, messages: list[Message], prompt: list[Message] | None) -> list[Message] | None:
    """The conversation with the other answer, or None. Pops its key. `prompt` is what `messages` answers, where known."""
    found = [key for key in REJECTED if key in rest]
    if len(found) > 1:
        raise RowFault(f"{' and '.join(map(repr, found))} both hold a rejected answer; keep one")
    if not found:
        return None
    answer = _answer(rest.pop(found[0]), found[0])
    if answer[0]["role"] != "assistant":
        if _first_question(answer) != _first_question(messages):
            raise RowFault(f"{found[0]!r} is a whole conversation, and begins otherwise than the accepted one")
        return answer
    if prompt is None:
        end = len(messages)
        if len(answer) > 1:  # several messages answer the last question, tool results in between
            end = 1 + max((n for n, message in enumerate(messages) if message["role"] == "user"), default=-1)
        while end and messages[end - 1]["role"] == "assistant":
            end -= 1
        prompt = messages[:end]
    return prompt + answer


def _first_question(messages: list[Message]) -> Message | None:
    return next((message for message in messages if message["role"] != "system"), None)


def _with_system(messages: list[Message], system: str | None) -> list[Message]:
    if not system or any(message["role"] == "system" for message in messages):
        return messages
    return [{"role": "system", "content": system}, *messages]


def _columns(rest: Row) -> Row:
    """The row's other columns: grounding and template arguments as objects, and all else as it is."""
    columns = dict(rest)
    if OBJECTS in columns:
        columns[OBJECTS] = decode(columns[OBJECTS])
    if "chat_template_kwargs" in columns:
        value = decode(columns["chat_template_kwargs"])
        if value == "":
            del columns["chat_template_kwargs"]
        elif not isinstance(value, dict):
            raise RowFault(f"chat_template_kwargs must be an object, not {kind(value)}")
        else:
            columns["chat_template_kwargs"] = value
    return columns
