"""The rows that every architecture is tried on: two talks of different lengths; for media, with a picture or a sound each."""

from __future__ import annotations

import io
import math
import struct
import wave
import zlib
from typing import Any

ANSWERS = ("It is 4, as 2 and 2 are 4.", "Yes.", "The sea is blue, mostly.")
TALKS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "What is 2 and 2?"}, {"role": "assistant", "content": ANSWERS[0]},
     {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": ANSWERS[1]}],
    [{"role": "user", "content": "How is the sea?"}, {"role": "assistant", "content": ANSWERS[2]}],
]  # fmt: skip
SIDE = 32
RATE = 16000


def text_rows() -> list[dict[str, Any]]:
    return [{"messages": talk} for talk in TALKS]


def media_rows(kind: str, other: bool = False) -> list[dict[str, Any]]:
    """`kind`: image, video or audio. `other`: the same rows with other pictures, frames or sounds."""
    key, make = {"image": ("images", png), "video": ("videos", frames), "audio": ("audios", wav)}[kind]
    rows = []
    for number, talk in enumerate(TALKS):
        first = [{"type": kind}, {"type": "text", "text": talk[0]["content"]}]
        rows.append({"messages": [{"role": "user", "content": first}, *talk[1:]], key: [make(number + (7 if other else 1))]})
    return rows


def png(seed: int) -> bytes:
    """A picture of SIDE x SIDE pixels: waves of colour."""
    lines = b"".join(
        b"\0"
        + bytes(round(127 + 127 * math.sin(seed * (x + 1) * (c + 1) / 9 + y * seed / 5)) for x in range(SIDE) for c in range(3))
        for y in range(SIDE)
    )
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def frames(seed: int) -> list[bytes]:
    """Four pictures, one after the other."""
    return [png(seed + 10 * number) for number in range(4)]


def wav(seed: int) -> bytes:
    """Half a second of a tone."""
    values = [round(12000 * math.sin(2 * math.pi * 110 * seed * n / RATE)) for n in range(RATE // 2)]
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(struct.pack(f"<{len(values)}h", *values))
    return content.getvalue()
