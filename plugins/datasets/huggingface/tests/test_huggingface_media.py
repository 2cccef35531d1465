"""Media of rows: from every form in common use to content parts and one list of references for each kind."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from swift_plugin_huggingface.config import HuggingFaceConfig
from swift_plugin_huggingface.dataset import open_dataset
from swift_plugin_huggingface.messages import RowFault
from swift_plugin_huggingface.rows import standard_row

IMAGE, VIDEO, AUDIO = {"type": "image"}, {"type": "video"}, {"type": "audio"}
URI = "data:image/png;base64,AAAA"


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def ask(content: Any, said: str = "a", **columns: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": said}], **columns}


def content(row: dict[str, Any], index: int = 0) -> Any:
    return row["messages"][index]["content"]


@pytest.mark.parametrize(
    ("raw", "parts", "media"),
    [
        (ask("<image>Who?", images=["a"]), [IMAGE, text("Who?")], {"images": ["a"]}),
        (ask("Who?\n<image>\n", image="a"), [text("Who?\n"), IMAGE, text("\n")], {"images": ["a"]}),
        (ask("<image><image>", images=["a", "b"]), [IMAGE, IMAGE], {"images": ["a", "b"]}),
        (ask("<audio>x<video><image>", images="a", videos="v", audio="s"), [AUDIO, text("x"), VIDEO, IMAGE],
         {"images": ["a"], "videos": ["v"], "audios": ["s"]}),
        (ask("<video> or <image>?", videos=["v"]), [VIDEO, text(" or <image>?")], {"videos": ["v"]}),
        (ask("what", videos=[["f1", "f2"]]), [VIDEO, text("what")], {"videos": [["f1", "f2"]]}),
        (ask([text("x"), {"type": "image_url", "image_url": {"url": URI}}]), [text("x"), IMAGE], {"images": [URI]}),
        (ask([{"type": "image_url", "image_url": "a"}, text("x")]), [IMAGE, text("x")], {"images": ["a"]}),
        (ask([{"type": "image", "image": "a"}, {"type": "image", "url": "http://h/b"}]), [IMAGE, IMAGE],
         {"images": ["a", "http://h/b"]}),
        (ask([{"type": "image", "image": "a"}, {"type": "image"}, {"type": "image", "path": "c"}], images=["b"]),
         [IMAGE, IMAGE, IMAGE], {"images": ["a", "b", "c"]}),
        (ask([{"type": "image", "image": "a", "max_pixels": 9}]), [{"type": "image", "max_pixels": 9}], {"images": ["a"]}),
        (ask([{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}, text("x")]), [AUDIO, text("x")],
         {"audios": ["data:audio/wav;base64,AAAA"]}),
        (ask([{"type": "video_url", "video_url": {"url": "file:///tmp/a%20b.mp4"}}]), [VIDEO], {"videos": ["/tmp/a b.mp4"]}),
        (ask([IMAGE, text("the tag <image> is text here")], images=["a"]), [IMAGE, text("the tag <image> is text here")],
         {"images": ["a"]}),
        (ask([text("see <image>!")], images=["a"]), [text("see "), IMAGE, text("!")], {"images": ["a"]}),
        ({"query": "<image>Who?", "response": "a", "images": ["a"]}, [IMAGE, text("Who?")], {"images": ["a"]}),
        ({"instruction": "Say", "input": "<image>", "output": "a", "image": "a"}, [text("Say\n"), IMAGE], {"images": ["a"]}),
        ({"image": "a", "conversations": [{"from": "human", "value": "Who?\n<image>"}, {"from": "gpt", "value": "a"}]},
         [text("Who?\n"), IMAGE], {"images": ["a"]}),
        (ask("<image>", images='["a.png"]'), [IMAGE], {"images": ["a.png"]}),
        (ask("<image>", images=[{"bytes": b"x", "path": "p"}]), [IMAGE], {"images": [b"x"]}),
        (ask("<image>", images=[{"bytes": None, "path": "p"}]), [IMAGE], {"images": ["p"]}),
        (ask("<image>", images=[{"bytes": "AAAA"}]), [IMAGE], {"images": ["data:image/octet-stream;base64,AAAA"]}),
    ],
)  # fmt: skip
def test_forms(raw: dict[str, Any], parts: list[Any], media: dict[str, Any]) -> None:
    row = standard_row(raw)
    assert content(row) == parts
    assert content(row, 1) == "a"  # a message without media stays a text
    assert {key: value for key, value in row.items() if key not in ("messages", "media_notes")} == media


def test_order_is_that_of_the_whole_conversation() -> None:
    talk = [
        {"role": "user", "content": "<image>one"}, {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two<image>"}, {"role": "assistant", "content": "2"},
    ]  # fmt: skip
    row = standard_row({"messages": talk, "images": ["a", "b"]})
    assert [content(row, n) for n in range(4)] == [[IMAGE, text("one")], "1", [text("two"), IMAGE], "2"]
    assert row["images"] == ["a", "b"]
    assert talk[0]["content"] == "<image>one"  # the caller's row is not changed


def test_without_tags_media_stand_before_the_first_question() -> None:
    row = standard_row({**ask("Who?", system="s"), "images": ["a", "b"]})
    assert row["messages"][0] == {"role": "system", "content": "s"}
    assert content(row, 1) == [IMAGE, IMAGE, text("Who?")]
    assert row["media_notes"] == ["media-in-front"]
    assert "media_notes" not in standard_row(ask("<image>Who?", images=["a"]))
    assert content(standard_row({"text": "a caption", "image": "a"})) == [IMAGE, text("a caption")]


def test_tags_without_media_are_text() -> None:
    assert standard_row(ask("What does <image> mean in HTML?")) == ask("What does <image> mean in HTML?")
    assert standard_row(ask("<image>", images=[])) == ask("<image>")


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (ask("<image>", images=["a", "b"]), "has 1 <image> tags, and the row has 2 images: there must be one for each"),
        (ask("<image><image>", images=["a"]), "messages has 2 <image> tags, and the row has 1 images"),
        (ask([IMAGE, IMAGE], images=["a"]), "messages has 2 image parts, and the row has 1 images"),
        (ask([IMAGE]), "messages has 1 image parts, and the row has 0 images"),
        (ask([IMAGE], images=["a", "b", "c"]), "messages has 1 image parts, and the row has 3 images"),
        (ask("x", images=["a", None]), "images[1] must be a path, a URL, a data URI or bytes of an image, not null"),
        (ask("x", video=3), "video[0] must be a path, a URL, a data URI or bytes of a video, not a number"),
        (ask("x", audios=[""]), "audios[0] must be a path, a URL, a data URI or bytes of an audio, not empty"),
        (ask("x", images=[{"file": "a"}]), "images[0] holds no image: an object needs 'bytes', 'path' or 'url'; keys found"),
        (ask("x", image="a", images=["b"]), "'image' and 'images' both hold the row's images; keep one"),
        (ask([{"type": "image_url", "image_url": {"href": "a"}}]), "messages[0].image_url holds no image"),
    ],
)  # fmt: skip
def test_refusals(raw: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowFault) as caught:
        standard_row(raw)
    assert reason in str(caught.value)


def test_preference_pairs_share_their_media() -> None:
    row = standard_row({"query": "<image>Who?", "chosen": "x", "rejected": "y", "image": "a"})
    assert row["messages"][0] == row["rejected"][0] == {"role": "user", "content": [IMAGE, text("Who?")]}
    assert (row["messages"][1]["content"], row["rejected"][1]["content"], row["images"]) == ("x", "y", ["a"])
    row = standard_row({"query": "Who?", "chosen": "x", "rejected": "y", "image": "a"})
    assert row["messages"][0] == row["rejected"][0] == {"role": "user", "content": [IMAGE, text("Who?")]}
    assert row["media_notes"] == ["media-in-front"]
    with pytest.raises(RowFault, match="rejected has 2 <image> tags, and the row has 1 images"):
        standard_row({"query": "<image>Who?", "chosen": "x", "rejected": "<image>y", "image": "a"})


def test_pictures_in_memory_become_bytes() -> None:
    picture = pytest.importorskip("PIL.Image").new("RGB", (3, 2), (255, 0, 1))
    row = standard_row(ask("<image>", images=[picture]))
    from PIL import Image

    again = Image.open(io.BytesIO(row["images"][0]))
    assert (again.size, again.getpixel((2, 1))) == ((3, 2), (255, 0, 1))


def read(folder: Path, *rows: Any, name: str = "rows.jsonl", **options: Any) -> list[Any]:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(open_dataset(HuggingFaceConfig(path=str(folder / name), **options)))


def test_relative_paths_start_at_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, work, other = tmp_path / "data", tmp_path / "work", tmp_path / "other"
    for folder in (data, work, other):
        folder.mkdir()
    for file in (data / "a.jpg", work / "a.jpg", work / "b.jpg", other / "a.jpg"):
        file.write_bytes(b"")
    monkeypatch.chdir(work)
    images = ["a.jpg", "b.jpg", "missing.jpg", "https://host/a.jpg", URI, str(other / "a.jpg")]
    rows = read(data, ask("<image>" * 6, images=images), ask("x", videos=[["a.jpg", "b.jpg"]]))
    assert rows[0].row["images"] == [str(data / "a.jpg"), *images[1:]]
    assert rows[1].row["videos"] == [[str(data / "a.jpg"), "b.jpg"]]
    forced = read(data, ask("<image>" * 6, images=images), media_folder=str(other))[0].row["images"]
    assert forced == [str(other / name) for name in images[:3]] + images[3:]
    with pytest.raises(ValueError, match="media_folder: no folder"):
        HuggingFaceConfig(path="x", media_folder=str(tmp_path / "absent"))


def test_paths_in_an_inner_folder_start_there(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    for file in (tmp_path / "inner" / "a.jpg", tmp_path / "b.jpg"):
        file.write_bytes(b"")
    (tmp_path / "inner" / "rows.jsonl").write_text(json.dumps(ask("x", images=["a.jpg", "b.jpg"])))
    row = next(iter(open_dataset(HuggingFaceConfig(path=str(tmp_path))))).row
    assert row["images"] == [str(tmp_path / "inner" / "a.jpg"), str(tmp_path / "b.jpg")]


def test_parquet_with_the_image_feature(tmp_path: Path) -> None:
    """As the datasets library writes pictures: structs of bytes and path, and parts whose other keys are null."""
    table = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "Who?"}]
    rows = [
        {"prompt": [{"role": "user", "content": parts}], "completion": "a", "images": [{"bytes": b"\x89PNG", "path": "x.png"}]}
    ]
    parquet.write_table(table.Table.from_pylist(rows), tmp_path / "rows.parquet")
    row = next(iter(open_dataset(HuggingFaceConfig(path=str(tmp_path / "rows.parquet"))))).row
    assert content(row) == [IMAGE, text("Who?")]
    assert row["images"] == [b"\x89PNG"]
