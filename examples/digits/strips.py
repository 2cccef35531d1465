"""Pictures of digit strings with questions about them, made of scikit-learn's 8 x 8 handwritten digits.

A picture is 64 x 64 pixels with a strip of digits across it, each enlarged to 16 x 16; in training they are moved, turned,
stretched and faded a little.
The digits of the held-out strips are other handwriting than those of the training strips. Rows have LLaVA's form.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIDE, CELL, TOP = 64, 16, 16  # of a picture and of a digit, and where a strip begins from above, in pixels
HELD_OUT = 360  # of the 1,797 digits: never in a training picture
READ, LARGEST = "Read the digits.", "Which is the largest digit?"


@dataclass(frozen=True)
class Strip:
    """One picture's digits: their numbers in scikit-learn's data set, where they stand, and a question about them."""

    digits: tuple[int, ...]
    start: int  # the first digit's column, in digits
    question: str
    seed: int | None  # of the variation; None for none

    def answer(self, labels: Sequence[int]) -> str:
        said = [int(labels[number]) for number in self.digits]
        return "".join(map(str, said)) if self.question == READ else str(max(said))


def draw(strip: Strip, images: Any) -> Any:
    """The picture, in levels of grey: uint8 [64, 64]."""
    import numpy as np

    rng = random.Random(strip.seed)
    page = np.zeros((SIDE, SIDE), np.uint8)
    for place, number in enumerate(strip.digits, strip.start):
        digit = enlarged(images[number] * (255 / 16), rng if strip.seed is not None else None)
        page[TOP : TOP + CELL, place * CELL : (place + 1) * CELL] = digit
    return page


def enlarged(digit: Any, rng: random.Random | None) -> Any:
    """A digit of 8 x 8 levels of grey, 0 to 255, as 16 x 16; with a generator, varied."""
    import numpy as np
    from PIL import Image

    picture = Image.fromarray(np.uint8(digit)).resize((CELL, CELL), Image.Resampling.BICUBIC)
    if rng is None:
        return np.asarray(picture)
    angle, stretch = math.radians(rng.uniform(-5, 5)), rng.uniform(0.95, 1.05)
    across, down, middle = rng.uniform(-1, 1), rng.uniform(-1, 1), (CELL - 1) / 2
    a, b = math.cos(angle) / stretch, math.sin(angle)
    c, d = -math.sin(angle) / stretch, math.cos(angle)
    shift = (middle - a * (middle + across) - b * (middle + down), middle - c * (middle + across) - d * (middle + down))
    moved = picture.transform((CELL, CELL), Image.Transform.AFFINE, (a, b, shift[0], c, d, shift[1]), Image.Resampling.BICUBIC)
    return np.uint8(np.asarray(moved) * rng.uniform(0.8, 1))


def strips(pool: Sequence[int], count: int, lengths: Sequence[int], seed: int, varied: bool) -> list[Strip]:
    """Random strips of digits of the pool, each of one of the lengths and with one of the two questions."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        digits = tuple(rng.choices(pool, k=rng.choice(lengths)))
        start = rng.randint(0, 4 - len(digits))
        made.append(Strip(digits, start, rng.choice((READ, LARGEST)), rng.randrange(2**32) if varied else None))
    return made


def row(strip: Strip, picture: str, labels: Sequence[int]) -> dict[str, Any]:
    talk = [{"from": "human", "value": f"<image>\n{strip.question}"}, {"from": "gpt", "value": strip.answer(labels)}]
    return {"image": picture, "conversations": talk}


def write(folder: Path, training: int, held_out: int) -> None:
    """train.jsonl; heldout.jsonl of strips of 2 to 4 digits; and the same held-out questions with the pictures of others
    (swapped.jsonl) and with an empty picture (blank.jsonl).

    Training strips have 1 to 4 digits: single ones teach the shapes early, longer ones the order.
    """
    from PIL import Image
    from sklearn.datasets import load_digits

    data = load_digits()
    numbers = list(range(len(data.images)))
    random.Random(0).shuffle(numbers)
    parts = {
        "train": strips(numbers[HELD_OUT:], training, (1, 1, 2, 3, 4), 1, varied=True),
        "heldout": strips(numbers[:HELD_OUT], held_out, (2, 3, 4), 2, varied=False),
    }
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, Any]]] = {}
    for part, made in parts.items():
        for number, strip in enumerate(made):
            Image.fromarray(draw(strip, data.images)).save(folder / "pictures" / f"{part}-{number:05d}.png")
        rows[part] = [row(strip, f"pictures/{part}-{n:05d}.png", data.target) for n, strip in enumerate(made)]
    Image.new("L", (SIDE, SIDE)).save(folder / "pictures" / "blank.png")
    rows["blank"] = [{**one, "image": "pictures/blank.png"} for one in rows["heldout"]]
    pictures = [one["image"] for one in rows["heldout"]]
    rows["swapped"] = [{**one, "image": other} for one, other in zip(rows["heldout"], pictures[1:] + pictures[:1], strict=True)]
    for part, found in rows.items():
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in found), encoding="utf-8")
