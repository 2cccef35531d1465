"""Pictures, videos and sounds of a row: one list of references for each kind, and content parts where they stand.

A reference is a path, a URL, a data URI or bytes; nothing is opened here. `<image>` tags and the parts of OpenAI's chat form
both become `{"type": "image"}` parts, and `row["images"]` holds the references in their order.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from swift_plugin_huggingface.messages import Message, RowFault, decode, kind

Row = dict[str, Any]
Reference = str | bytes | list[Any]

MEDIA = {"image": "images", "video": "videos", "audio": "audios"}
"""A kind -> the row's key for its references."""
TAG = re.compile(r"<(image|video|audio)>")
PARTS = {
    "image": "image", "image_url": "image", "input_image": "image",
    "video": "video", "video_url": "video", "input_video": "video",
    "audio": "audio", "audio_url": "audio", "input_audio": "audio",
}  # fmt: skip
"""The type of a content part -> its kind."""
HOLDERS = ("url", "path", "data", "base64", "bytes")  # where a part, or an object in it, holds its reference
IN_FRONT = "media-in-front"


def read_media(row: Row) -> dict[str, list[Reference]]:
    """Pops a row's media columns, `images` or `image` and so on: one value or a list. Raises RowFault."""
    found: dict[str, list[Reference]] = {}
    for name, column in MEDIA.items():
        keys = [key for key in (column, name) if not _absent(row.get(key))]
        if len(keys) > 1:
            raise RowFault(f"{name!r} and {column!r} both hold the row's {column}; keep one, or rename it with dataset.columns")
        for key in (column, name):
            value = decode(row.pop(key, None))
            if key in keys:
                items = value if isinstance(value, list) else [value]
                found[column] = [reference(item, f"{key}[{n}]", name) for n, item in enumerate(items)]
    return found


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, (str, list)) and not value)


def reference(value: Any, where: str, name: str) -> Reference:
    """A path, URL, data URI or bytes, from any form that data sets have; a list of those for a video given as its frames."""
    value = decode(value)
    if isinstance(value, dict):
        key = next((key for key in ("bytes", "path", "url") if value.get(key) not in (None, "", b"")), None)
        if key is None:
            keys = ", ".join(map(str, value)) or "none"
            raise RowFault(f"{where} holds no {name}: an object needs 'bytes', 'path' or 'url'; keys found: {keys}")
        value = value[key]
        if key == "bytes" and isinstance(value, str):  # JSON has no bytes
            value = _base64(value, name)
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, (bytearray, memoryview)):
        value = bytes(value)
    if isinstance(value, (str, bytes)) and value:
        return _local(value) if isinstance(value, str) else value
    if name == "image" and hasattr(value, "save") and hasattr(value, "mode"):  # a PIL picture
        buffer = io.BytesIO()
        value.save(buffer, format="PNG")
        return buffer.getvalue()
    if name == "video" and isinstance(value, list) and value:
        return [reference(frame, f"{where}[{n}]", "image") for n, frame in enumerate(value)]
    shown = "empty" if isinstance(value, (str, bytes, list)) and not value else kind(value)
    raise RowFault(f"{where} must be a path, a URL, a data URI or bytes of {_a(name)}, not {shown}")


def _base64(text: str, name: str, form: str = "octet-stream") -> str:
    return text if text.startswith("data:") else f"data:{name}/{form};base64,{text}"


def _local(text: str) -> str:
    """`file://` addresses as paths; all else as it is."""
    return unquote(urlparse(text).path) if text.startswith("file://") else text


def place(conversations: Sequence[tuple[str, list[Message]]], columns: dict[str, list[Reference]]) -> tuple[Row, list[str]]:
    """A row's conversations with content parts for its media, and its columns in the order in which these appear.

    conversations: (key, messages), such as `("messages", [...])`, `("rejected", [...])`; all must show the same media.
    columns: the row's own lists. Returns `{key: messages, "images": [...], ...}` and notes.
    Raises RowFault where the number of places differs from the number of references.
    """
    row: Row = {}
    notes: list[str] = []
    found: dict[str, list[Reference]] | None = None
    for key, messages in conversations:
        row[key], used, moved = _conversation(messages, columns, key)
        if found is not None and used != found:
            raise RowFault(f"{key!r} shows other media than 'messages'; both must begin with the same question")
        found = used
        notes += [IN_FRONT] if moved and IN_FRONT not in notes else []
    return {**row, **{name: items for name, items in (found or {}).items() if items}}, notes


def _conversation(
    messages: list[Message], columns: dict[str, list[Reference]], key: str
) -> tuple[list[Message], dict[str, list[Reference]], bool]:
    """The messages with parts, the references in order of appearance, and whether parts were put in front."""
    held = {PARTS[part["type"]] for message in messages for part in _parts(message) if part["type"] in PARTS}
    tagged = {name for name, column in MEDIA.items() if columns.get(column)} - held
    used: dict[str, list[Reference]] = {column: [] for column in MEDIA.values()}
    waiting = {column: iter(columns.get(column, ())) for column in MEDIA.values()}
    places = dict.fromkeys(MEDIA.values(), 0)

    def take(part: Row, where: str) -> Row:
        name = PARTS[part["type"]]
        own, rest = _own_reference(part, where, name)
        item = own if own is not None else next(waiting[MEDIA[name]], None)
        places[MEDIA[name]] += 1
        if item is not None:
            used[MEDIA[name]].append(item)
        return {"type": name, **rest}

    placed = [_message(message, tagged, take, f"{key}[{n}]") for n, message in enumerate(messages)]
    absent = [column for column, count in places.items() if not count and columns.get(column)]
    if absent:
        placed = _in_front(placed, absent, columns)
        used.update({column: list(columns[column]) for column in absent})
    for name, column in MEDIA.items():
        given = len(used[column]) + sum(1 for _ in waiting[column])  # those that a part took, or holds, and those left
        if column not in absent and given != places[column]:
            form = f"<{name}> tags" if name in tagged else f"{name} parts"
            raise RowFault(f"{key} has {places[column]} {form}, and the row has {given} {column}: there must be one for each")
    return placed, used, bool(absent)


def _parts(message: Message) -> list[Row]:
    content = message.get("content")
    return content if isinstance(content, list) else []


def _message(message: Message, tagged: set[str], take: Callable[[Row, str], Row], where: str) -> Message:
    """The message, its tags of the kinds in `tagged` and its media parts replaced by plain media parts."""
    content = message.get("content")
    if isinstance(content, str):
        parts = list(_split(content, tagged))
        if all(part["type"] == "text" for part in parts):
            return message
    elif isinstance(content, list):
        parts = [piece for part in content for piece in (_split_part(part, tagged) if part["type"] == "text" else [part])]
    else:
        return message
    return {**message, "content": [take(part, where) if part["type"] in PARTS else part for part in parts]}


def _split_part(part: Row, tagged: set[str]) -> list[Row]:
    pieces = list(_split(part["text"], tagged))
    return [part] if all(piece["type"] == "text" for piece in pieces) else pieces


def _split(text: str, tagged: set[str]) -> Iterator[Row]:
    """Parts of a text: its tags as media parts, what stands between them as text, to the letter."""
    start = 0
    for match in TAG.finditer(text):
        if match[1] in tagged:
            if match.start() > start:
                yield {"type": "text", "text": text[start : match.start()]}
            yield {"type": match[1]}
            start = match.end()
    if start < len(text):
        yield {"type": "text", "text": text[start:]}


def _own_reference(part: Row, where: str, name: str) -> tuple[Reference | None, Row]:
    """The reference that a content part holds itself, or None, and its other keys."""
    rest = {key: value for key, value in part.items() if key != "type" and value is not None}
    keys = [key for key in (part["type"], f"{name}_url", name, *HOLDERS) if key in rest]
    if not keys:
        return None, {key: value for key, value in rest.items() if key != "text"}
    value = rest.pop(keys[0])
    at = f"{where}.{keys[0]}"
    if isinstance(value, dict) and isinstance(value.get("data"), str):  # OpenAI's input_audio: base64 and a form
        value = _base64(value["data"], name, str(value.get("format") or "octet-stream"))
    elif keys[0] in ("base64", "data", "bytes") and isinstance(value, str):
        value = _base64(value, name)
    return reference(value, at, name), {key: item for key, item in rest.items() if key not in ("text", *keys)}


def _in_front(messages: list[Message], absent: list[str], columns: dict[str, list[Reference]]) -> list[Message]:
    """The messages with parts for the columns in `absent` before what the first user message says, as LLaVA's data mean it;
    before the first message where no user speaks, as in a caption."""
    first = next((n for n, message in enumerate(messages) if message["role"] == "user"), 0)
    front = [{"type": name} for name, column in MEDIA.items() if column in absent for _ in columns[column]]
    content = messages[first].get("content") or []
    text = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return [*messages[:first], {**messages[first], "content": [*front, *text]}, *messages[first + 1 :]]


def locate(item: Reference, folders: Sequence[Path], forced: Path | None = None) -> Reference:
    """A reference whose relative path is made to start where the file is: in `forced`, where that is given; else in the first
    of `folders` that has it, else in the working folder, as it is."""
    if isinstance(item, list):
        return [locate(frame, folders, forced) for frame in item]
    if not is_path(item) or Path(item).is_absolute():
        return item
    if forced is not None:
        return str(forced / item)
    return next((str(folder / item) for folder in folders if (folder / item).is_file()), item)


def is_path(item: Any) -> bool:
    return (
        isinstance(item, str) and len(item) < 4096 and "://" not in item and not item.startswith("data:") and "\0" not in item
    )


def _a(name: str) -> str:
    return f"{'an' if name[0] in 'aio' else 'a'} {name}"
