"""Small sets of images with objects in COCO's format, written for one test."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.data.conftest import picture

CATEGORIES = [{"id": 7, "name": "cell"}, {"id": 3, "name": "dot"}]  # not in the order of the ids
SIZES = ((20, 30), (24, 18), (20, 30))  # (height, width)


def write_images(folder: Path, sizes=SIZES) -> list[dict[str, Any]]:
    """a.png, b.png, ..., and their entries in COCO's list, with ids from 11 on."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, (height, width) in enumerate(sizes):
        name = f"{'abcdefgh'[number]}.png"
        picture(number, (height, width)).save(folder / name)
        entries.append({"id": 11 + number, "file_name": name, "height": height, "width": width})
    return entries


def boxes_of() -> list[dict[str, Any]]:
    """Two objects and a crowd of the first image, one object of the third; none of the second."""
    rows = [
        (11, 7, [2, 3, 10, 8], 0),
        (13, 3, [0, 0, 30, 20], 0),
        (11, 3, [20.5, 1, 4, 6], 0),
        (11, 7, [1, 10, 20, 9], 1),
    ]
    return [
        {"id": 100 + n, "image_id": image, "category_id": category, "bbox": box, "iscrowd": crowd}
        for n, (image, category, box, crowd) in enumerate(rows)
    ]


def document(images, annotations=None, categories=None) -> dict[str, Any]:
    return {
        "images": images,
        "annotations": boxes_of() if annotations is None else annotations,
        "categories": CATEGORIES if categories is None else categories,
    }


def coco_set(root: Path, annotations=None, splits=("train",), categories=None) -> Path:
    """ROOT/SPLIT.json and ROOT/images, the same images in every split."""
    images = write_images(root / "images")
    for split in splits:
        text = json.dumps(document(images, annotations, categories))
        (root / f"{split}.json").write_text(text, encoding="utf-8")
    return root


def random_mask(seed: int, height: int, width: int) -> np.ndarray:
    """A few rectangles: (height, width) bool, of one pixel at least."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), bool)
    for _ in range(3):
        top, left = rng.integers(0, height), rng.integers(0, width)
        mask[top : top + rng.integers(1, 6), left : left + rng.integers(1, 6)] = True
    return mask


def runs_of(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed counts, pixel by pixel."""
    counts, last = [0], False
    for value in mask.T.reshape(-1).tolist():
        if value != last:
            counts.append(0)
            last = value
        counts[-1] += 1
    return counts
