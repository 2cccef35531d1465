"""Reads lists of messages: OpenAI's chat form, ShareGPT's, and the older spellings of tool calls.

Pure functions. Each raises RowFault with the address of what is wrong, such as `messages[2].tool_calls[0]: no 'name'`.
"""

from __future__ import annotations

import json
import math
from typing import Any

Message = dict[str, Any]

CALL = "call"  # not a role: an assistant message that holds a tool call only
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant",
    "tool": "tool", "function": "tool", "tool_response": "tool", "function_response": "tool",
    "observation": "tool", "observations": "tool",
    "function_call": CALL, "tool_call": CALL,
}  # fmt: skip
"""Every role that is understood -> the standard one."""

RENAMED = {"loss": "train", "loss_scale": "weight"}  # what ms-swift calls them


class RowFault(ValueError):
    """Why a row cannot be used; the text is for people."""


def kind(value: Any) -> str:
    """What a value is, in words: `a number`, `an object`."""
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def decode(value: Any) -> Any:
    """The value of a text that holds a JSON list or object, as columns of flat files do; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def read_messages(value: Any, name: str) -> list[Message]:
    """Standard messages from a list of messages, or from its JSON text. `name` is the list's key, for error messages."""
    value = decode(value)
    if not isinstance(value, list):
        raise RowFault(f"{name} must be a list of messages, not {kind(value)}")
    if not value:
        raise RowFault(f"{name} is empty")
    found: list[Message] = []
    for number, item in enumerate(value):
        where = f"{name}[{number}]"
        if not isinstance(item, dict):
            raise RowFault(f"{where} must be an object with a role and content, not {kind(item)}")
        if CALL in (ROLES.get(str(item.get(key))) for key in ("role", "from")):
            _append_call(found, _read_message(item, where))
        else:
            found += _read_item(item, where)
    return found


def _read_item(item: Message, where: str) -> list[Message]:
    """The messages of one list item: one, or a pair where it reads `{"human": ..., "assistant": ...}`."""
    if "role" in item or "from" in item:
        return [_read_message(item, where)]
    if len(item) == 2 and [ROLES.get(key) for key in item] == ["user", "assistant"]:
        return [{"role": ROLES[key], "content": _content(text, f"{where}.{key}")} for key, text in item.items()]
    raise RowFault(f"{where}: no 'role' (or 'from'); keys found: {', '.join(map(str, item)) or 'none'}")


def _read_message(item: Message, where: str) -> Message:
    rest = {key: value for key, value in item.items() if value is not None}
    role_key = "role" if "role" in item else "from"
    role = ROLES.get(named) if isinstance(named := item[role_key], str) else None
    if role is None:
        raise RowFault(f"{where}: unknown role {named!r}; known: {', '.join(ROLES)}")
    content_key = "content" if "content" in item or "value" not in item else "value"
    rest.pop(role_key, None)
    content = rest.pop(content_key, None)
    message: Message = {"role": "assistant" if role == CALL else role, "content": content}
    calls = _take_calls(rest, where)
    if role == CALL:
        # "" and not None: many chat templates look for text in it.
        message["content"], calls = "", read_calls(content, f"{where}.{content_key}")
    elif role == "tool" and content_key == "value" and not isinstance(content, str):
        message["content"] = json.dumps(content, ensure_ascii=False)
    silent = bool(calls or rest.get("reasoning_content")) and role in ("assistant", CALL)
    if message["content"] is not None or not silent:
        message["content"] = _content(message["content"], f"{where}.{content_key}")
    if calls:
        if message["role"] != "assistant":
            raise RowFault(f"{where}: tool_calls belong to an assistant message, not to a {message['role']} message")
        message["tool_calls"] = calls
    return {**message, **_flags(rest, where)}


def _content(value: Any, where: str) -> Any:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise RowFault(f"{where} must be text or a list of parts, not {'an empty list' if value == [] else kind(value)}")
    for number, part in enumerate(value):
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise RowFault(f"{where}[{number}] must be an object with a 'type', such as {{'type': 'text', 'text': ...}}")
        if part["type"] == "text" and not isinstance(part.get("text"), str):
            raise RowFault(f"{where}[{number}]: a text part needs 'text', and it must be text")
    return value


def _flags(rest: Message, where: str) -> Message:
    """The message's other keys, with `train` and `weight` checked, and ms-swift's names for them understood."""
    for old, new in RENAMED.items():
        if old in rest:
            if new in rest:
                raise RowFault(f"{where}: {old!r} and {new!r} mean the same; keep one")
            rest[new] = rest.pop(old)
            # where the type is wrong, the message names the key that the user wrote
            _check_flag(new, rest[new], f"{where}.{old}")
    for key in RENAMED.values():
        if key in rest:
            _check_flag(key, rest[key], f"{where}.{key}")
    return rest


def _check_flag(key: str, value: Any, where: str) -> None:
    if key == "train" and not isinstance(value, bool):
        raise RowFault(f"{where} must be true or false, not {kind(value)}")
    if key == "weight":
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise RowFault(f"{where} must be a number, not {kind(value)}")
        if not math.isfinite(value) or value < 0:
            raise RowFault(f"{where} must be 0 or more, not {value}")


def _append_call(found: list[Message], message: Message) -> None:
    """Add a call that stands as an item of its own. It joins the assistant's text or call right before it: one turn."""
    last = found[-1] if found else None
    if last and last["role"] == "assistant":
        flags = [{key: entry.get(key) for key in ("train", "weight")} for entry in (last, message)]
        if flags[0] == flags[1]:
            found[-1] = {**last, "tool_calls": last.get("tool_calls", []) + message["tool_calls"]}
            return
    found.append(message)


def _take_calls(rest: Message, where: str) -> list[dict[str, Any]]:
    """Pops a message's tool calls: `tool_calls`, or the `function_call` of OpenAI's first form."""
    key = "tool_calls" if "tool_calls" in rest else "function_call"
    value = rest.pop(key, None)
    return read_calls(value, f"{where}.{key}") if value not in (None, [], "") else []


def read_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls as `{"type": "function", "function": {"name", "arguments": object}}`, from one or a list of them.

    Takes JSON text, calls with and without the `function` level, and arguments as JSON text. Other keys, such as `id`,
    are kept.
    """
    value = decode(value)
    calls = value if isinstance(value, list) else [value]
    found = []
    for number, call in enumerate(calls):
        at = f"{where}[{number}]" if isinstance(value, list) else where
        call = decode(call)
        if not isinstance(call, dict):
            raise RowFault(f"{at} must be a tool call, as an object or its JSON text, not {_shown(call)}")
        inner = ("function",) if isinstance(call.get("function"), dict) else [key for key in call if key not in ("id", "type")]
        outer = {key: item for key, item in call.items() if key not in inner}
        function = call["function"] if "function" in inner else {key: call[key] for key in inner}
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise RowFault(f"{at}: no 'name'; keys found: {', '.join(function)}")
        arguments = _arguments(function.get("arguments"), f"{at}.arguments")
        found.append({**outer, "type": outer.get("type", "function"), "function": {**function, "arguments": arguments}})
    if not found:
        raise RowFault(f"{where} is empty")
    return found


def _arguments(value: Any, where: str) -> dict[str, Any]:
    if value is None or (isinstance(value, str) and not value.strip()):
        return {}
    decoded = decode(value)
    if not isinstance(decoded, dict):
        raise RowFault(f"{where} must be an object, or the JSON text of one, not {_shown(decoded)}")
    return decoded


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else ""
    return f"{text[:40]!r}" + ("..." if len(text) > 40 else "") if text else kind(value)


def read_tools(value: Any, name: str = "tools") -> list[dict[str, Any]]:
    """Tools as `[{"type": "function", "function": {...}}]`, from a list or its JSON text; bare functions are wrapped."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    value = decode(value)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise RowFault(f"{name} must be a list of tools, or the JSON text of one, not {_shown(value)}")
    found = []
    for number, tool in enumerate(map(decode, value)):
        where = f"{name}[{number}]"
        if not isinstance(tool, dict):
            raise RowFault(f"{where} must be an object, not {_shown(tool)}")
        function = tool.get("function", tool)
        if function is tool and tool.get("type", "function") != "function":
            found.append(tool)  # a tool that a model has built in, such as {"type": "code_interpreter"}
            continue
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowFault(f"{where}: a function needs a 'name'; keys found: {', '.join(tool)}")
        if function is tool:
            function = {key: item for key, item in tool.items() if key != "type"}
            found.append({"type": "function", "function": function})
        else:
            found.append({**tool, "type": tool.get("type", "function")})
    return found
