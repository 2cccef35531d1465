"""Requests with pictures and sounds: the engine on five tiny multimodal models; `infer`, `eval` and `chat` on one."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support import swift
from swift_core.errors import CapabilityError
from swift_core.types import ModelBundle, Request
from swift_plugin_torch.config import TransformersEngineConfig
from swift_plugin_torch.engine import TransformersEngine
from swift_plugin_transformers.chat import ChatTemplate
from swift_plugin_transformers.config import ChatTemplateConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "plugins/models/transformers/tests"))
from media_models import MODELS, picture, sound

ALL = pytest.mark.parametrize("name", MODELS)


@cache
def opened(name: str) -> TransformersEngine:
    tiny = MODELS[name]()
    template = ChatTemplate(tiny.processor, ChatTemplateConfig())
    return TransformersEngine(ModelBundle(tiny.model, tiny.processor, name, template=template), TransformersEngineConfig())


def request(kind: str, media: list[Any], text: str, **options: Any) -> Request:
    parts = [{"type": kind} for _ in media]
    content: Any = [*parts, {"type": "text", "text": text}] if media else text
    messages = [{"role": "user", "content": content}]
    return Request(messages, max_tokens=6, media={f"{kind}s": media} if media else {}, **options)


def requests(name: str) -> list[Request]:
    kind = MODELS[name]().kind
    media = [picture(n, size) for n, size in enumerate(((40, 24), (24, 60), (64, 20)))]
    if kind == "audio":
        media = [sound(n, seconds) for n, seconds in enumerate((0.3, 0.9, 0.5))]
    shown = [[media[0]], [], [media[1]], [media[0], media[2]], [], [media[2]]]
    texts = ("What?", "Hello", "Who is it?", "Both", "x", "?")
    return [request(kind, found, text) for found, text in zip(shown, texts, strict=True)]


@ALL
def test_a_mixed_batch_gives_what_single_requests_give(name: str) -> None:
    engine, asked = opened(name), requests(name)
    together = {completion.index: completion for completion in engine.generate(asked)}
    assert sorted(together) == list(range(len(asked)))
    for number, one in enumerate(asked):
        (alone,) = engine.generate([one])
        assert together[number].token_ids == alone.token_ids
        assert together[number].logprobs == pytest.approx(alone.logprobs, abs=2e-4)
        assert together[number].prompt_tokens == alone.prompt_tokens
        *pieces, whole = engine.generate([one], stream=True)
        assert whole.token_ids == alone.token_ids
        assert "".join(piece.text for piece in pieces) == whole.text[: sum(len(piece.text) for piece in pieces)]


@ALL
def test_generation_is_that_of_the_library(name: str) -> None:
    """The processor's own rendering and `generate`, without any code of ours."""
    engine, asked = opened(name), requests(name)[0]
    processor, (kind, media) = engine.bundle.processor, next(iter(asked.media.items()))
    text = processor.apply_chat_template(asked.messages, add_generation_prompt=True, tokenize=False)
    given = {"audio": [one["array"] for one in media], "sampling_rate": 16000} if kind == "audios" else {kind: media}
    inputs = processor(text=[text], **given, return_tensors="pt")
    made = engine.model.generate(
        **inputs, max_new_tokens=6, do_sample=False, eos_token_id=engine.template.stop_ids(), pad_token_id=0
    )
    (found,) = engine.generate([asked])
    count = inputs["input_ids"].shape[1]
    assert found.token_ids == made[0, count:].tolist()
    assert found.prompt_tokens == count


@ALL
def test_media_change_the_answer(name: str) -> None:
    engine, asked = opened(name), requests(name)
    first, other = asked[0], asked[2]
    swapped = Request(first.messages, max_tokens=6, media=other.media)
    scores = [next(iter(engine.generate([one]))).logprobs[0] for one in (first, swapped)]
    assert abs(scores[0] - scores[1]) > 1e-5


@ALL
def test_logprobs_of_samples_see_their_media(name: str) -> None:
    engine, asked = opened(name), requests(name)
    answer = {"role": "assistant", "content": "A cat."}
    samples = [engine.template.encode({"messages": [*one.messages, answer], **one.media})[0] for one in asked]
    found = engine.logprobs([sample.input_ids for sample in samples], samples=samples)
    for sample, scores in zip(samples, found, strict=True):
        batch = engine.template.collate([sample])
        with torch.inference_mode():
            logits = engine.model(**batch.inputs, use_cache=False).logits[0]
        ids = torch.tensor(sample.input_ids)
        expected = torch.log_softmax(logits[:-1].float(), -1).gather(-1, ids[1:, None])[:, 0]
        assert scores == pytest.approx(expected.tolist(), abs=2e-4)


def test_a_model_of_text_says_that_it_takes_no_pictures(tiny_bundle: Any) -> None:
    engine = TransformersEngine(tiny_bundle, TransformersEngineConfig())
    assert "media" not in engine.capabilities
    assert "media" in opened("llava").capabilities
    with pytest.raises((CapabilityError, ValueError), match="this model takes text only"):
        list(engine.generate([Request([{"role": "user", "content": "x"}], media={"images": ["a.png"]})]))


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model, and a data file: a picture, a broken one, text, a picture that is not there, and two pictures."""
    root, tiny = tmp_path_factory.mktemp("shown"), MODELS["llava"]()
    tiny.model.save_pretrained(root / "model")
    tiny.processor.save_pretrained(root / "model")
    for number in (1, 2):
        picture(number).save(root / f"{number}.png")
    (root / "broken.png").write_bytes((root / "1.png").read_bytes()[:60])
    shown = [["1.png"], ["broken.png"], [], ["absent.png"], ["1.png", "2.png"]]
    lines = [{"query": "<image>" * len(images) + "What?", "response": "a cat", "images": images} for images in shown]
    (root / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def test_infer_records_what_cannot_be_read(folder: Path) -> None:
    output = folder / "answers.jsonl"
    command = [
        "infer",
        "--model",
        folder / "model",
        "--dataset",
        folder / "rows.jsonl",
        "--output",
        output,
        "--max-tokens",
        "4",
    ]
    assert swift(*command, "--json").ok().json() == {"output": str(output), "answered": 3, "failed": 2, "resumed": 0}
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row.get("images") for row in rows[:3]] == [[str(folder / "1.png")], [str(folder / "broken.png")], None]
    assert ["error" in row for row in rows] == [False, True, False, True, False]
    assert rows[1]["error"].startswith(f"image {folder / 'broken.png'} cannot be read: ")
    assert rows[3]["error"] == "image absent.png cannot be read: no such file"
    assert all(row["tokens"] for row in rows if "error" not in row)


def test_eval_scores_rows_with_pictures(folder: Path) -> None:
    output = folder / "report.json"
    command = ["eval", "--model", folder / "model", "--dataset", folder / "rows.jsonl", "--output", output]
    found = swift(*command, "evaluator.max_tokens=4", "--json").ok().json()
    assert (found["counts"]["rows"], found["counts"]["scored"], found["counts"]["refused"]) == (5, 3, 2)
    assert found["metrics"]["exact_match"] == 0.0
    assert 1 < found["metrics"]["perplexity"] < 10_000
    rows = json.loads(output.read_text())["rows"]
    assert "broken.png cannot be read" in rows[1]["not_scored"]["answer"]
    assert "broken.png cannot be read" in rows[1]["not_scored"]["perplexity"]
    assert rows[0]["scores"]["perplexity"] > 1


def test_chat_shows_files(folder: Path) -> None:
    saved = folder / "talk.jsonl"
    said = [
        f"/image {folder / '1.png'}", "What?", "And now?", "/image absent.png", f"/image {folder / 'broken.png'}", "Look",
        f"/image {folder / '2.png'}", "Other", f"/save {saved}", "/clear", "Plain", "/exit",
    ]  # fmt: skip
    done = swift("chat", "--model", folder / "model", "--max-tokens", "3", stdin="\n".join(said) + "\n").ok()
    assert f"({folder / '1.png'} goes with the next message)" in done.out
    assert "(not shown: no file absent.png)" in done.out
    assert f"(not asked: image {folder / 'broken.png'} cannot be read" in done.out
    talk = json.loads(saved.read_text())
    assert talk["images"] == [str(folder / "1.png"), str(folder / "2.png")]
    assert [message["role"] for message in talk["messages"]] == ["user", "assistant"] * 3
    assert talk["messages"][0]["content"] == [{"type": "image"}, {"type": "text", "text": "What?"}]
    assert talk["messages"][2]["content"] == "And now?"


def test_chat_with_a_model_of_text(tiny_folder: Path, folder: Path) -> None:
    said = [f"/image {folder / '1.png'}", "Hello", "/exit"]
    done = swift("chat", "--model", tiny_folder, "--max-tokens", "3", stdin="\n".join(said) + "\n").ok()
    assert "(not shown: this model takes text only)" in done.out
