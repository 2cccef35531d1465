"""Pictures and sounds in messages over HTTP, with tiny models of five families: the answer is the engine's to the same row."""

from __future__ import annotations

import base64
import io
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import soundfile
from openai import OpenAI
from swift_core.answers import message_of
from swift_core.types import ModelBundle, Request
from swift_plugin_serve.tokens import Tokens
from swift_plugin_torch.config import TransformersEngineConfig
from swift_plugin_torch.engine import TransformersEngine
from swift_plugin_transformers.chat import ChatTemplate
from swift_plugin_transformers.config import ChatTemplateConfig

sys.path.insert(0, str(Path(__file__).parents[3] / "models/transformers/tests"))
from media_models import MODELS, picture, sound

TEXTS = ("What?", "Who is it?", "Both")


def png(number: int, size: tuple[int, int]) -> bytes:
    target = io.BytesIO()
    picture(number, size).save(target, "PNG")
    return target.getvalue()


def wav(number: int, seconds: float) -> bytes:
    target = io.BytesIO()
    soundfile.write(target, np.asarray(sound(number, seconds)["array"]), 16000, format="WAV")
    return target.getvalue()


def files(kind: str) -> list[list[bytes]]:
    """The media of three rows."""
    made = [png(n, size) for n, size in enumerate(((40, 24), (24, 60), (64, 20)))]
    if kind == "audio":
        made = [wav(n, seconds) for n, seconds in enumerate((0.3, 0.9, 0.5))]
    return [[made[0]], [made[1]], [made[0], made[2]]]


def part(kind: str, content: bytes) -> dict[str, Any]:
    coded = base64.b64encode(content).decode()
    if kind == "audio":
        return {"type": "input_audio", "input_audio": {"data": coded, "format": "wav"}}
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{coded}"}}


@pytest.fixture(scope="module", params=MODELS)
def opened(request: pytest.FixtureRequest, start: Any) -> Iterator[tuple[str, TransformersEngine, OpenAI]]:
    tiny = MODELS[request.param]()
    template = ChatTemplate(tiny.processor, ChatTemplateConfig())
    bundle = ModelBundle(tiny.model, tiny.processor, request.param, template=template)
    engine = TransformersEngine(bundle, TransformersEngineConfig())
    with start(engine, template, tiny.processor) as server:
        yield tiny.kind, engine, OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    engine.close()


def messages(kind: str, media: list[bytes], text: str) -> Any:
    return [{"role": "user", "content": [*(part(kind, one) for one in media), {"type": "text", "text": text}]}]


def expected(engine: TransformersEngine, kind: str, media: list[bytes], text: str, folder: Path) -> Any:
    """The engine's own answer, the media in files."""
    paths = []
    for n, content in enumerate(media):
        paths.append(str(folder / f"{n}.{'wav' if kind == 'audio' else 'png'}"))
        Path(paths[-1]).write_bytes(content)
    parts = [{"type": kind} for _ in media]
    row = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    (found,) = [done for done in engine.generate([Request(row, max_tokens=6, media={f"{kind}s": paths})]) if done.finish]
    return found


def said(engine: TransformersEngine, done: Any) -> str:
    """The text of an answer's tokens as the template reads them: bytes beside a special token are no character together."""
    reader = engine.template.reader([], None)  # type: ignore[attr-defined]
    return str(message_of([*reader.feed(done.token_ids), *reader.close()])["content"])


def same(told: list[Any], want: Any, tokens: Tokens) -> bool:
    """Whether an answer is the wanted one, token for token; from a near-tie of the two likeliest on it may be another. Rows
    that are computed together round differently."""
    assert len(told) == len(want.token_ids)
    for entry, token, logprob in zip(told, want.token_ids, want.logprobs, strict=True):
        assert entry.logprob == pytest.approx(logprob, abs=2e-4)
        if bytes(entry.bytes) != tokens.bytes(token):
            return False
    return True


def test_answers_are_the_engine_s(opened: tuple[str, TransformersEngine, OpenAI], tmp_path: Path) -> None:
    kind, engine, client = opened
    rows = [*zip(files(kind), TEXTS, strict=True), (files(kind)[0], TEXTS[0])]
    wanted = [expected(engine, kind, media, text, tmp_path) for media, text in rows]
    ask: dict[str, Any] = {"model": "scripted", "temperature": 0, "max_completion_tokens": 6, "logprobs": True}

    def whole(row: tuple[list[bytes], str]) -> Any:
        return client.chat.completions.create(messages=messages(kind, *row), **ask)

    def streamed(row: tuple[list[bytes], str]) -> Any:
        return list(client.chat.completions.create(messages=messages(kind, *row), stream=True, **ask))

    tokens = Tokens(engine.bundle.processor)
    with ThreadPoolExecutor(8) as pool:
        answers, streams = pool.map(whole, rows), pool.map(streamed, rows)
    for want, answer, parts in zip(wanted, answers, streams, strict=True):
        (choice,) = answer.choices
        if same(choice.logprobs.content, want, tokens):
            assert choice.message.content == said(engine, want)
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (want.prompt_tokens, len(want.token_ids))
        if same([entry for one in parts if one.choices[0].logprobs for entry in one.choices[0].logprobs.content], want, tokens):
            assert "".join(one.choices[0].delta.content or "" for one in parts) == said(engine, want)
    assert len({tuple(want.logprobs) for want in wanted}) > 1, "the media change nothing"


def test_responses_see_them_too(opened: tuple[str, TransformersEngine, OpenAI], tmp_path: Path) -> None:
    kind, engine, client = opened
    (content,), text = files(kind)[1], "What?"
    shown: Any = part(kind, content)
    if kind == "image":
        shown = {"type": "input_image", "image_url": shown["image_url"]["url"]}
    given: Any = [{"role": "user", "content": [shown, {"type": "input_text", "text": text}]}]
    made = client.responses.create(model="scripted", input=given, temperature=0, max_output_tokens=6)
    assert made.output_text == said(engine, expected(engine, kind, [content], text, tmp_path))
    again = client.responses.create(
        model="scripted", input="And now?", previous_response_id=made.id, temperature=0, max_output_tokens=6
    )
    assert again.usage is not None
    assert made.usage is not None
    assert again.usage.input_tokens > made.usage.input_tokens, "the conversation lost its media"


def test_what_cannot_be_read_is_told(opened: tuple[str, TransformersEngine, OpenAI]) -> None:
    kind, _, client = opened
    for media, text, message in (
        ([files(kind)[0][0][:40]], "What?", "cannot be read"),
        ([b""], "What?", "cannot be read"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            client.chat.completions.create(model="scripted", messages=messages(kind, media, text), max_completion_tokens=3)
    if kind == "image":
        for url in ("file:///etc/passwd", "/etc/passwd", "data:image/png,abc"):
            told: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
            with pytest.raises(openai.BadRequestError):
                client.chat.completions.create(model="scripted", messages=told, max_completion_tokens=3)
