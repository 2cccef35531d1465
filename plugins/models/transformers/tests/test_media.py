"""References to media and what they decode to; options, refusals and vanished files, on a tiny model's template."""

from __future__ import annotations

import base64
import io
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from swift_core.errors import RequestError, RunError
from swift_core.types import Row
from swift_plugin_transformers.chat import ChatTemplate
from swift_plugin_transformers.config import ChatTemplateConfig, MediaOptions
from swift_plugin_transformers.media import Decoded, MediaError, collect, decode, film, frozen, picture, sound, spread
from swift_plugin_transformers.multimodal import Multimodal
from swift_plugin_transformers.tensors import Layout, join
from swift_plugin_transformers.testing import make_tokenizer

sys.path.insert(0, str(Path(__file__).parent))
import media_models

PLAIN = MediaOptions()
SHOW = {"type": "image"}


def template(name: str = "llava", **media: Any) -> ChatTemplate:
    return ChatTemplate(media_models.MODELS[name]().processor, ChatTemplateConfig(media=media))


def asking(*images: Any, parts: int | None = None) -> Row:
    shown = [SHOW] * (len(images) if parts is None else parts)
    return {
        "messages": [
            {"role": "user", "content": [*shown, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "A cat."},
        ],
        "images": list(images),
    }


def png(image: Any) -> bytes:
    target = io.BytesIO()
    image.save(target, "PNG")
    return target.getvalue()


@pytest.fixture
def square(tmp_path: Path) -> Path:
    path = tmp_path / "square.png"
    media_models.picture(1, (16, 16)).save(path)
    return path


# --- references -------------------------------------------------------------------------------------------------------


def test_every_form_of_a_picture_is_the_same_picture(square: Path) -> None:
    data = square.read_bytes()
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    forms = [str(square), square, f"file://{square}", uri, data, {"bytes": data, "path": "x.png"}, {"path": str(square)},
             Image.open(square), np.asarray(Image.open(square))]  # fmt: skip
    wanted = np.asarray(Image.open(square).convert("RGB"))
    for form in forms:
        assert (np.asarray(picture(frozen(form, "image"), PLAIN)) == wanted).all(), form


def test_parts_take_the_rows_references_in_order_or_hold_their_own() -> None:
    row = {
        "messages": [
            {"role": "user", "content": [SHOW, {"type": "image_url", "image_url": {"url": "own.png"}}, SHOW]},
            {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "QUJD", "format": "wav"}}]},
        ],
        "images": ["first.png", "second.png"],
    }
    messages, media = collect(row)
    assert media == [
        [("image", "first.png"), ("image", "own.png"), ("image", "second.png")],
        [("audio", "data:audio/*;base64,QUJD")],
    ]
    assert [message["content"] for message in messages] == [[SHOW] * 3, [{"type": "audio"}]]
    assert row["messages"][0]["content"][1]["type"] == "image_url"  # the row is as it was


@pytest.mark.parametrize(("parts", "images"), [(1, 2), (2, 1), (0, 1)])
def test_counts_that_differ_are_told(parts: int, images: int, square: Path) -> None:
    with pytest.raises(ValueError, match=f"the messages place {parts} images, and the row has {images}"):
        template().encode(asking(*[str(square)] * images, parts=parts))


def test_media_for_a_model_of_text_are_refused(square: Path) -> None:
    with pytest.raises(ValueError, match="this checkpoint takes text only"):
        ChatTemplate(make_tokenizer(), ChatTemplateConfig()).encode(asking(str(square)))


def test_a_kind_that_the_processor_does_not_take_is_refused() -> None:
    row = {
        "messages": [{"role": "user", "content": [{"type": "video"}]}, {"role": "assistant", "content": "a"}],
        "videos": ["a"],
    }
    with pytest.raises(ValueError, match=r"videos, which this checkpoint's processor does not take; .*video_as_images"):
        template().encode(row)


def test_the_web_is_asked_only_where_that_is_allowed() -> None:
    with pytest.raises(MediaError, match=r"image https://x\.test/a\.png cannot be read: .*template\.media\.allow_urls=true"):
        template().encode(asking("https://x.test/a.png"))


@pytest.mark.parametrize(
    ("content", "reason"), [(b"no picture at all", "cannot identify"), (None, "no such file"), (b"", "cannot identify")]
)
def test_a_broken_picture_is_named(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "broken.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MediaError, match=f"image {path} cannot be read: .*{reason}") as found:
        template().encode(asking(str(path)))
    assert found.value.skip is False
    with pytest.raises(MediaError) as found:
        template(on_error="skip").encode(asking(str(path)))
    assert found.value.skip is True


def test_a_picture_that_ends_too_early_is_broken(square: Path) -> None:
    square.write_bytes(square.read_bytes()[:-60])
    with pytest.raises(MediaError, match="truncated"):
        template().encode(asking(str(square)))


def test_an_option_that_is_none_is_told() -> None:
    with pytest.raises(RequestError, match=r"template\.media: unknown option 'max_pixel'. Did you mean: max_pixels"):
        template(max_pixel=3)
    with pytest.raises(RequestError, match="min_pixels: 9 is above max_pixels, 4"):
        template(min_pixels=9, max_pixels=4)


# --- decoding ---------------------------------------------------------------------------------------------------------


def test_a_picture_is_turned_as_its_camera_was_held(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 4), "red")
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert picture(str(tmp_path / "turned.jpg"), PLAIN).size == (4, 8)


@pytest.mark.parametrize(
    ("limits", "size"), [({"max_pixels": 200}, (20, 10)), ({"min_pixels": 3200}, (80, 40)), ({}, (40, 20))]
)
def test_the_area_of_a_picture_is_kept_within_limits(limits: dict[str, int], size: tuple[int, int]) -> None:
    reference = frozen(Image.new("RGB", (40, 20)), "image")
    assert decode([("image", reference)], 16000, MediaOptions(**limits)).images[0].size == size


def test_a_sound_is_one_channel_at_the_rate_asked_for(tmp_path: Path) -> None:
    """440 Hz at 44,100 a second, left channel only: half as loud, and 440 Hz at 16,000."""
    time = np.arange(44100) / 44100
    tone = np.stack([np.sin(2 * np.pi * 440 * time), np.zeros(44100)], 1)
    soundfile.write(tmp_path / "tone.wav", tone, 44100)
    heard = sound(str(tmp_path / "tone.wav"), 16000, PLAIN)
    assert heard.shape == (16000,)
    assert heard.dtype == np.float32
    wanted = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert np.abs(heard - wanted)[100:-100].max() < 0.01
    assert len(sound(str(tmp_path / "tone.wav"), 16000, MediaOptions(max_seconds=0.25))) == 4000


def make_video(path: Path, frames: int = 24, rate: int = 8) -> Path:
    """Frame n is a grey of 10 n."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(rate))
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for n in range(frames):
            frame = av.VideoFrame.from_image(Image.new("RGB", (32, 32), (10 * n,) * 3))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_frames_of_a_video_are_taken_evenly(tmp_path: Path) -> None:
    path = make_video(tmp_path / "grey.mp4")
    frames, facts = film(str(path), MediaOptions(fps=2.0))
    assert facts["frames_indices"] == [0, 5, 9, 14, 18, 23]
    assert (facts["total_num_frames"], facts["fps"], facts["duration"]) == (24, 8.0, 3.0)
    greys = [np.asarray(frame).mean() for frame in frames]
    assert np.abs(np.array(greys) - 10 * np.array(facts["frames_indices"])).max() < 6
    few = film({"bytes": path.read_bytes()}, MediaOptions(fps=9, max_frames=3))[1]
    assert few["frames_indices"] == [0, 12, 23]


def test_places_are_spread_over_the_whole() -> None:
    assert spread(100, 5, 99) == [0, 25, 50, 74, 99]
    assert spread(3, 10, 99) == [0, 1, 2]
    assert spread(7, 1, 99) == [0]


def test_a_video_is_shown_as_its_frames_to_a_model_of_pictures(tmp_path: Path) -> None:
    path = make_video(tmp_path / "grey.mp4")
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "A cat."},
        ],
        "videos": [str(path)],
    }
    made = template("idefics", video_as_images=True, max_frames=3)
    (sample,) = made.encode(row)
    assert sample.text.count("<image>") == 3
    frames = made.collate([sample]).inputs["pixel_values"]
    as_pictures = asking(*film(str(path), MediaOptions(max_frames=3))[0])
    (same,) = made.encode(as_pictures)
    assert sample.input_ids == same.input_ids
    assert (frames == made.collate([same]).inputs["pixel_values"]).all()


@pytest.mark.parametrize("limit", [64, 9, 4])
def test_a_picture_is_shrunk_to_its_budget_of_tokens(limit: int) -> None:
    """A picture of 64 x 64 makes 8 x 8 tokens of Qwen's processor here."""
    made = template("qwen", max_tokens=limit)
    (sample,) = made.encode(asking(media_models.picture(1, (64, 64)), media_models.picture(2, (16, 16))))
    pad = made.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    grids = made.collate([sample]).inputs["image_grid_thw"].prod(1) // 4
    assert sample.input_ids.count(pad) == int(grids.sum())
    assert limit * 0.4 <= int(grids[0]) <= limit
    assert int(grids[1]) == 4  # within the budget: left as it is


def own_template(kind: Any, pictures: Any, image: str, more: list[str], **arguments: Any) -> ChatTemplate:
    chat = media_models.PARTS
    for name, text in (("IMAGE", image), ("AUDIO", ""), ("VIDEO", "")):
        chat = chat.replace(name, repr(text))
    words = media_models.tokenizer([image, *more], chat)
    words.image_token, words.sep_token = image, more[0]
    processor = kind(pictures, words, **arguments)
    processor.chat_template = chat
    return ChatTemplate(processor, ChatTemplateConfig())


def test_a_processor_that_takes_a_list_in_a_list_for_pages_is_given_a_list() -> None:
    from transformers import GotOcr2Processor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    pictures = GotOcr2ImageProcessorPil(size={"height": 16, "width": 16})
    made = own_template(GotOcr2Processor, pictures, "<imgpad>", ["</s>", "<img>", "</img>"])
    (sample,) = made.encode(asking(media_models.picture(1)))
    assert sample.text.count("<imgpad>") == 1
    assert sample.input_ids.count(made.tokenizer.convert_tokens_to_ids("<imgpad>")) == 256
    assert made.collate([sample]).inputs["pixel_values"].shape == (1, 3, 16, 16)


def test_a_processor_that_ends_the_text_in_its_own_way_leaves_it_alone() -> None:
    from transformers import ChameleonProcessor
    from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil

    pictures = ChameleonImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    more = ["</s>", "<racm3:break>", "<eoss>"]
    made = own_template(ChameleonProcessor, pictures, "<image>", more, image_seq_length=4)
    (sample,) = made.encode(asking(media_models.picture(1)))
    assert sample.input_ids.count(made.tokenizer.convert_tokens_to_ids("<image>")) == 4
    assert made.tokenizer.sep_token_id not in sample.input_ids


def test_a_budget_that_cannot_be_kept_is_told() -> None:
    with pytest.raises(ValueError, match=r"template\.media\.max_tokens, whatever its size"):
        template("llava", max_tokens=5).encode(asking(media_models.picture(1)))


# --- batches ----------------------------------------------------------------------------------------------------------


def test_a_file_that_vanished_or_changed_is_told_when_the_batch_is_made(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    media_models.picture(1, (32, 32)).save(path)
    made = template("qwen")
    (sample,) = made.encode(asking(str(path)))
    sample.where = "rows.jsonl:7"
    media_models.picture(1, (64, 32)).save(path)
    with pytest.raises(
        RunError, match=rf"rows.jsonl:7: its media make \d+ tokens, and made \d+ .*has a file changed\? \({path}\)"
    ):
        made.collate([sample])
    path.unlink()
    with pytest.raises(RunError, match=rf"rows.jsonl:7: image {path} cannot be read: no such file"):
        made.collate([sample])


@pytest.mark.parametrize("name", ["qwen", "idefics", "audio"])
def test_threads_make_the_same_batches(name: str) -> None:
    one, four = template(name, workers=0), template(name, workers=4)
    kind = "audio" if name == "audio" else "image"
    media = [media_models.sound(n, 0.1 * n) if kind == "audio" else media_models.picture(n, (8 * n, 40)) for n in range(1, 9)]
    rows = [
        {"messages": [{"role": "user", "content": [{"type": kind}]}, {"role": "assistant", "content": "a"}], f"{kind}s": [item]}
        for item in media
    ]
    samples = [sample for row in rows for sample in one.encode(row)]
    plain, threaded = one.collate(samples).inputs, four.collate(samples).inputs
    assert plain.keys() == threaded.keys()
    assert all((plain[key] == threaded[key]).all() for key in plain)


# --- batches ----------------------------------------------------------------------------------------------------------


def test_pictures_that_follow_each_other_in_an_inner_dimension_do_so_in_a_batch() -> None:
    """As those of processors that lay all pictures of a call end to end, with a first dimension that is always 1."""
    parts = [{"pixels": torch.full((1, 3, 2, length), float(length))} for length in (4, 6)]
    places = [(0, 0, 5), (1, 0, 5)]
    joined = join(parts, places, (2, 5), (), Layout(along={"pixels": 3}))
    assert joined["pixels"].shape == (1, 3, 2, 10)
    assert joined["pixels"][0, 0, 0].tolist() == [4.0] * 4 + [6.0] * 6
    assert join(parts, places, (2, 5), (), Layout(frozenset({"pixels"})))["pixels"].shape == (2, 3, 2, 6)


def test_indices_into_patches_count_on_over_the_texts_of_a_batch() -> None:
    """As Molmo 2's, of 2 x 3 patches to a text here; -1 points nowhere. A text without media takes no place."""
    one = {"pixel_values": torch.zeros(2, 3, 4), "image_token_pooling": torch.tensor([[0, 5], [2, -1]])}
    joined = join([one, {}, one], [(0, 0, 5), (1, 0, 5), (2, 0, 5)], (3, 5), (), Layout())
    assert joined["image_token_pooling"].tolist() == [[0, 5], [2, -1], [6, 11], [8, -1]]
    assert joined["pixel_values"].shape == (4, 3, 4)
    assert one["image_token_pooling"].tolist() == [[0, 5], [2, -1]]


def test_a_processor_that_takes_videos_by_the_name_of_images_is_given_them_so() -> None:
    class InstructBlipVideoProcessor:
        tokenizer, video_processor, given = make_tokenizer(), object(), {}

        def __call__(self, **given: Any) -> dict[str, Any]:
            self.given = given
            return {}

    processor = InstructBlipVideoProcessor()
    video = np.zeros((4, 8, 8, 3), np.uint8)
    Multimodal(processor, PLAIN, lambda messages: "").call("a", Decoded(videos=[video], metadata=[{}]))
    assert processor.given["images"][0] is video
    assert not {"videos", "video_metadata"} & processor.given.keys()
