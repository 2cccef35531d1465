"""Standard rows' messages as OpenAI's API takes them: media in their parts, tool calls with ids and their arguments as text."""

from __future__ import annotations

import base64
import json
import mimetypes
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from swift_core.errors import CapabilityError, RequestError
from swift_core.types import Row

KEPT = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "refusal")  # what a server is sent
MAGIC = {
    b"\x89PNG": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
    b"RIFF": "image/webp",
    b"BM": "image/bmp",
}
SOUNDS = {b"RIFF": "wav", b"ID3": "mp3", b"\xff\xfb": "mp3", b"fLaC": "flac", b"OggS": "ogg"}


def outgoing(messages: Sequence[Row], media: Mapping[str, Sequence[Any]]) -> list[Row]:
    """Messages for the wire. `media` are references in the order of the parts that show them.

    Raises RequestError for a file that cannot be read or a part without its medium, CapabilityError for frames of a video.
    """
    left = {key: iter(items) for key, items in media.items()}
    sent = [_message(message, left, number) for number, message in enumerate(messages)]
    if spare := [key for key, items in left.items() if next(items, None) is not None]:
        raise RequestError(f"the request has more {spare[0]} than its messages have parts for")
    _pair(sent)
    return sent


def _message(message: Row, left: Mapping[str, Iterator[Any]], number: int) -> Row:
    sent = {key: value for key, value in message.items() if key in KEPT and value is not None}
    if isinstance(sent.get("content"), list):
        sent["content"] = [_part(part, left) for part in sent["content"]]
    if calls := sent.get("tool_calls"):
        sent["tool_calls"] = [_call(call, f"call_{number}_{n}") for n, call in enumerate(calls)]
    sent.setdefault("content", None if calls else "")
    return sent


def _call(call: Row, ident: str) -> Row:
    function = dict(call.get("function", call))
    arguments = function.get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"id": call.get("id") or ident, "type": "function", "function": {"name": function.get("name"), "arguments": text}}


def _pair(messages: Sequence[Row]) -> None:
    """Give each tool's answer the id of the call that it answers, in order, where it has none."""
    waiting: list[str] = []
    for message in messages:
        if message.get("tool_calls"):
            waiting = [call["id"] for call in message["tool_calls"]]
        elif message["role"] == "tool":
            ident = message.setdefault("tool_call_id", waiting[0] if waiting else "call_0")
            waiting = [other for other in waiting if other != ident]


def _part(part: Any, left: Mapping[str, Iterator[Any]]) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("image", "video", "audio"):
        return part
    item = part.get(kind) or next(left.get(f"{kind}s", iter(())), None)
    if item is None:
        raise RequestError(f"a message shows an {kind} that the request does not have")
    if kind == "audio" and not _is_address(item):
        content = _content(item, kind)
        name = Path(item).suffix[1:].lower() if isinstance(item, str) else ""
        form = name or next((form for magic, form in SOUNDS.items() if content.startswith(magic)), "wav")
        return {"type": "input_audio", "input_audio": {"data": base64.b64encode(content).decode(), "format": form}}
    return {"type": f"{kind}_url", f"{kind}_url": {"url": _address(item, kind)}}


def _is_address(item: Any) -> bool:
    return isinstance(item, str) and item.startswith(("http://", "https://", "data:"))


def _address(item: Any, kind: str) -> str:
    """What an item is found at: an address as it is, else its content as a `data:` address."""
    if _is_address(item):
        return str(item)
    content = _content(item, kind)
    guessed = mimetypes.guess_type(item)[0] if isinstance(item, str) else None
    mime = guessed or next((mime for magic, mime in MAGIC.items() if content.startswith(magic)), f"{kind}/mp4")
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def _content(item: Any, kind: str) -> bytes:
    if isinstance(item, bytes):
        return item
    if not isinstance(item, str | Path):
        raise CapabilityError(f"engine openai sends an {kind} as a file, an address or bytes, not as {type(item).__name__}")
    try:
        return Path(item).read_bytes()
    except OSError as err:
        raise RequestError(f"{kind} {item}: {err.strerror}") from None
