"""Messages as OpenAI's clients send them, to messages as rows have them: media apart, texts joined where there is nothing else.

No file of this machine is ever read because a request names it: media are data URIs, or addresses of the web.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from swift_core.types import Row

from swift_plugin_serve.errors import ApiError

MEDIA = {"image": "images", "video": "videos", "audio": "audios"}
DROPPED = ("refusal", "annotations")  # of an assistant's message that a client sends back; they say nothing to a model
REFUSED = {"function_call": "an older form of a call: use 'tool_calls'", "audio": "sounds are not kept here"}
WEB = re.compile(r"https?://", re.IGNORECASE)

Media = dict[str, list[Any]]


def standard(messages: Sequence[Row]) -> tuple[list[Row], Media]:
    """Messages with bare media parts, and the media in their order. Raises ApiError."""
    media: Media = {}
    found = [_message(message, media, f"messages.{n}") for n, message in enumerate(messages)]
    return found, media


def _message(message: Row, media: Media, place: str) -> Row:
    made = {key: value for key, value in message.items() if value is not None and key not in DROPPED}
    if made["role"] == "developer":  # what OpenAI calls a system message today; chat templates know the older name
        made["role"] = "system"
    for key, why in REFUSED.items():
        if key in made:
            raise ApiError(400, f"{place}.{key} is not supported: {why}", code="unsupported_parameter", param=f"{place}.{key}")
    if "content" not in made and isinstance(message.get("refusal"), str) and made["role"] == "assistant":
        made["content"] = message["refusal"]
    content = made.get("content")
    if content is None and not made.get("tool_calls"):
        raise ApiError(400, f"{place}: the message has no content", param=f"{place}.content")
    if content is None:
        made["content"] = None
    if isinstance(content, list):
        parts = [_part(part, media, f"{place}.content.{n}") for n, part in enumerate(content)]
        if all(part["type"] == "text" for part in parts):
            made["content"] = "\n".join(part["text"] for part in parts)
        else:
            made["content"] = parts
    return made


def _part(part: Row, media: Media, place: str) -> Row:
    kind = part["type"]
    if kind == "text":
        return {"type": "text", "text": part["text"]}
    if kind == "refusal":
        return {"type": "text", "text": part["refusal"]}
    if kind == "input_audio":
        sound = part["input_audio"]
        media.setdefault("audios", []).append(f"data:audio/{sound['format']};base64,{sound['data']}")
        return {"type": "audio"}
    name = kind.removesuffix("_url")
    media.setdefault(MEDIA[name], []).append(reference(part[kind]["url"], f"{place}.{kind}.url"))
    return {"type": name}


def reference(url: str, place: str) -> str:
    """An address that may be opened: data or the web. Raises ApiError."""
    if url[:5].lower() == "data:" or WEB.match(url):
        return url if url.startswith("data:") else re.sub(r"^data:", "data:", url, flags=re.IGNORECASE)
    raise ApiError(400, f"{place}: a data: URI is expected, such as data:image/png;base64,...", param=place)
