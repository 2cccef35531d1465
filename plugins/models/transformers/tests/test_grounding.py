"""Boxes and points in each family's convention, from each type of coordinates, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from swift_core.errors import RequestError
from swift_plugin_transformers.grounding import Convention, ground, resized

QWEN2 = Convention(
    box="<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>", point="<|box_start|>({x},{y})<|box_end|>",
    ref="<|object_ref_start|>{ref}<|object_ref_end|>",
)  # fmt: skip
QWEN25 = Convention(box='{{"bbox_2d": [{x1}, {y1}, {x2}, {y2}]}}', scale="resized")
INTERN = Convention(box="<box>[[{x1}, {y1}, {x2}, {y2}]]</box>", point="<box>[[{x}, {y}]]</box>", ref="<ref>{ref}</ref>")
PALI = Convention(
    box="<loc{y1:04d}><loc{x1:04d}><loc{y2:04d}><loc{x2:04d}>", point="<loc{y:04d}><loc{x:04d}>",
    scale="norm1024", largest=1023,
)  # fmt: skip
SHARES = Convention(scale="norm1", decimals=3)
SIZES = [(640, 480), (100, 200)]
RESIZED = [(644, 476), (112, 196)]
BOX = [64, 48, 320, 480]


def size_of(number: int) -> tuple[int, int]:
    return SIZES[number]


def resized_of(number: int) -> tuple[int, int]:
    return RESIZED[number]


def never(number: int) -> tuple[int, int]:
    raise AssertionError("the size of a picture is not needed here")


def said(text: Any, objects: Any, convention: Convention = QWEN2, of: Any = size_of, after: Any = never) -> Any:
    return ground([{"role": "user", "content": text}], objects, convention, of, after)[0]["content"]


@pytest.mark.parametrize(
    ("convention", "expected"),
    [
        (Convention(), "the cat is at [100, 100, 500, 1000]"),
        (QWEN2, "the <|object_ref_start|>cat<|object_ref_end|> is at <|box_start|>(100,100),(500,1000)<|box_end|>"),
        (INTERN, "the <ref>cat</ref> is at <box>[[100, 100, 500, 1000]]</box>"),
        (PALI, "the cat is at <loc0102><loc0102><loc1023><loc0512>"),
        (SHARES, "the cat is at [0.1, 0.1, 0.5, 1.0]"),
        (Convention(scale="real"), "the cat is at [64, 48, 320, 480]"),
    ],
)
def test_conventions(convention: Convention, expected: str) -> None:
    assert said("the <ref-object> is at <bbox>", {"ref": ["cat"], "bbox": [BOX]}, convention) == expected


def test_resized_pixels() -> None:
    objects = {"bbox": [BOX, [50, 50]], "image_id": [0, 1]}
    expected = '{"bbox_2d": [64, 48, 322, 476]} and [56, 49]'
    assert said("<bbox> and <bbox>", objects, QWEN25, size_of, resized_of) == expected


@pytest.mark.parametrize(
    ("kind", "box"), [("real", [64, 48, 320, 480]), ("norm1", [0.1, 0.1, 0.5, 1.0]), ("norm1000", [100, 100, 500, 1000])]
)
def test_types_of_coordinates_agree(kind: str, box: list[float]) -> None:
    objects = {"bbox": [box], "bbox_type": kind}
    assert said("<bbox>", objects, Convention()) == "[100, 100, 500, 1000]"
    assert said("<bbox>", objects, Convention(scale="real")) == "[64, 48, 320, 480]"
    if kind != "real":  # then no picture is opened
        assert said("<bbox>", objects, Convention(), never) == "[100, 100, 500, 1000]"


def test_order_over_messages_and_parts() -> None:
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Find <ref-object> and <ref-object>."}]},
        {"role": "assistant", "content": "<bbox><bbox>", "weight": 0.5},
    ]
    objects = {"ref": ["a", "b"], "bbox": [[0, 0], [640, 480]], "image_id": 0}
    made = ground(messages, objects, Convention(), size_of, never)
    assert made[0]["content"] == [{"type": "image"}, {"type": "text", "text": "Find a and b."}]
    assert made[1] == {"role": "assistant", "content": "[0, 0][1000, 1000]", "weight": 0.5}
    assert messages[1]["content"] == "<bbox><bbox>"


def test_text_that_only_looks_like_grounding_stays() -> None:
    assert said("a <bbox> tag", None) == "a <bbox> tag"
    assert said("no tag", {"bbox": [[1, 2, 3, 4]]}) == "no tag"
    assert said("a <bbox> tag", {"category": [3], "area": [9]}) == "a <bbox> tag"  # another data set's column of that name


@pytest.mark.parametrize(
    ("text", "objects", "reason"),
    [
        ("<bbox>", {"bbox": [[1, 2], [3, 4]]}, "the messages have 1 <bbox> tags, and objects.bbox has 2"),
        ("<ref-object><bbox>", {"bbox": [[1, 2]]}, "the messages have 1 <ref-object> tags, and objects.ref has 0"),
        ("<bbox>", {"bbox": [[1, 2, 3]]}, r"objects.bbox[0] must be [x1, y1, x2, y2] or [x, y]"),
        ("<bbox>", {"bbox": [[1, "2"]]}, r"objects.bbox[0] must hold numbers"),
        ("<bbox>", {"bbox": [[5, 2, 3, 4]]}, r"objects.bbox[0] is [5, 2, 3, 4]: x1 and y1 must not be above x2 and y2"),
        ("<bbox>", {"bbox": [[700, 2]]}, r"objects.bbox[0] is [700, 2], outside of its picture, which ends at [640, 480]"),
        ("<bbox>", {"bbox": [[70, 2]], "bbox_type": "norm1"}, "ends at [1, 1] (bbox_type norm1)"),
        ("<bbox>", {"bbox": [[1, 2]], "bbox_type": "pixel"}, "objects.bbox_type: expected real, norm1, norm1000, not 'pixel'"),
        ("<bbox>", {"bbox": [[1, 2]], "image_id": ["a"]}, "objects.image_id must have the number of a picture"),
        ("<ref-object>", {"ref": [3]}, "objects.ref[0] must be text, not int"),
        ("<bbox>", {"bbox": "1 2 3 4"}, "objects.bbox must be a list, not str"),
    ],
)
def test_refusals(text: str, objects: Any, reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        said(text, objects)
    assert reason in str(caught.value)


def test_a_box_one_pixel_over_the_edge_ends_at_it() -> None:
    assert said("<bbox>", {"bbox": [[0, 0, 641, 481]]}, Convention()) == "[0, 0, 1000, 1000]"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"scale": "percent"}, "grounding.scale: expected real, resized or norm1000"),
        ({"box": "[{x1}, {y1}]"}, "grounding.box: '[{x1}, {y1}]' must have the fields x1, y1, x2, y2"),
        ({"point": "({a},{b})"}, "grounding.point: '({a},{b})' cannot be written"),
        ({"box": "{x1"}, "grounding.box"),
    ],
)
def test_bad_conventions(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        Convention(**options)
    assert reason in str(caught.value)


def test_sizes_out_of_a_real_processor() -> None:
    image = pytest.importorskip("PIL.Image").new("RGB", (100, 60))
    from transformers import CLIPImageProcessorPil, Qwen2VLImageProcessorPil

    width, height = resized(Qwen2VLImageProcessorPil(min_pixels=784, max_pixels=10**6), image)
    assert (width, height) == (112, 56)  # multiples of 28, the nearest to 100 x 60
    assert resized(CLIPImageProcessorPil(size={"height": 64, "width": 32}, do_center_crop=False), image) == (32, 64)


def test_rows_of_a_template_with_pictures() -> None:
    """Through the whole template: sizes come from the row's own picture, and the option of the template decides the form."""
    from media_models import llava, picture
    from swift_plugin_transformers.chat import ChatTemplate
    from swift_plugin_transformers.config import ChatTemplateConfig

    processor = llava().processor
    talk = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where is the <ref-object>?"}]},
        {"role": "assistant", "content": "Here: <bbox>"},
    ]
    row = {"messages": talk, "images": [picture(1, (40, 24))], "objects": {"ref": ["cat"], "bbox": [[10, 6, 40, 24]]}}
    (sample,) = ChatTemplate(processor, ChatTemplateConfig()).encode(row)
    assert "Where is the cat?" in sample.text
    ((start, end),) = sample.spans
    assert sample.text[start:end].lstrip().startswith("Here: [250, 250, 1000, 1000]")
    options = {"box": "<{x1},{y1},{x2},{y2}>", "scale": "resized"}
    (sample,) = ChatTemplate(processor, ChatTemplateConfig(grounding=options)).encode(row)
    assert "Here: <4,4,16,16>" in sample.text  # the processor makes 16 x 16 pixels of it
    with pytest.raises(ValueError, match=r"objects\.image_id names picture 2, and the row shows 1"):
        ChatTemplate(processor, ChatTemplateConfig()).encode({**row, "objects": {**row["objects"], "image_id": [2]}})
    with pytest.raises(RequestError, match=r"template\.grounding: unknown option 'boxes'"):
        ChatTemplate(processor, ChatTemplateConfig(grounding={"boxes": "x"}))
