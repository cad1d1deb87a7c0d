"""Small sets of images with segments in COCO's panoptic format, written for one test."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.data.scenes import SIZES, write_images
from vitrail_runtime.panoptic import colours_of

CATEGORIES = [
    {"id": 9, "name": "sky", "isthing": 0},
    {"id": 7, "name": "cell", "isthing": 1},
    {"id": 3, "name": "dot", "isthing": 1},
]
IDS = {"sky": 255, "one": 256, "two": 70_000, "crowd": 7}  # 255 is no class of a view


def maps() -> list[np.ndarray]:
    """Of each image of SIZES: sky with two things and a crowd; sky alone; a thing, and nothing beside it."""
    first, second, third = (np.zeros(size, np.int64) for size in SIZES)
    first[2:] = IDS["sky"]
    first[4:9, 5:9] = IDS["one"]
    first[6:14, 20:25] = IDS["two"]
    first[15:, 26:] = IDS["crowd"]
    second[:] = IDS["sky"]
    third[3:8, 10:14] = IDS["one"]
    return [first, second, third]


def lists() -> list[list[dict[str, Any]]]:
    def told(name: str, category: int, crowd: int = 0) -> dict[str, Any]:
        return {"id": IDS[name], "category_id": category, "iscrowd": crowd}

    first = [told("two", 3), told("sky", 9), told("one", 7), told("crowd", 7, 1)]
    return [first, [told("sky", 9)], [told("one", 3)]]


def document(images, segments=None, categories=None) -> dict[str, Any]:
    pairs = zip(images, lists() if segments is None else segments, strict=True)
    annotations = [
        {"image_id": e["id"], "file_name": f"{Path(e['file_name']).stem}.png", "segments_info": s}
        for e, s in pairs
    ]
    return {
        "images": images,
        "annotations": annotations,
        "categories": CATEGORIES if categories is None else categories,
    }


def write_ids(folder: Path, given=None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, ids in zip("abc", maps() if given is None else given, strict=True):
        Image.fromarray(colours_of(ids)).save(folder / f"{name}.png")


def panoptic_set(root: Path, segments=None, splits=("train",), given=None, categories=None) -> Path:
    """ROOT/panoptic_SPLIT.json, ROOT/panoptic_SPLIT and ROOT/images, the same in every split."""
    images = write_images(root / "images")
    for split in splits:
        text = json.dumps(document(images, segments, categories))
        (root / f"panoptic_{split}.json").write_text(text, encoding="utf-8")
        write_ids(root / f"panoptic_{split}", given)
    return root
