"""Tiny sets that tiny models learn within seconds: bright squares on the left or the right, shapes with
their class maps, and blocks with their boxes. What holds for every task is tested with a `Tiny` of each.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitrail.data.augmentation import Augmentation
from vitrail.train.config import TrainConfig
from vitrail_runtime.panoptic import colours_of, segments_of

CLASSES = ("left", "right", "top")
BOXES = {"left": (6, 1), "right": (6, 15), "top": (1, 8)}  # (row, column) of the square

# A plain vision transformer without BatchNorm, small enough for a test.
VIT = {
    "model": "vit_tiny_patch16",
    "model_fields": {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8},
}

# A segmenter without BatchNorm: an image may be a part of a batch by itself.
SEGMENTER = VIT | {
    "model": "semantic_fpn/vit_tiny_patch16",
    "head_fields": {"fpn_dim": 8, "dim": 8, "groups": 2},
}
SHAPES = ("ground", "disk", "box")
IGNORED = 255  # in a mask: no class

# A detector without BatchNorm, which answers whatever it is sure of. Every anchor proposes and it learns from
# all proposals: nothing is drawn at random, and no rounding decides which of two near doubles goes.
DETECTOR = VIT | {
    "model": "faster_rcnn/vit_tiny_patch16",
    "head_fields": {
        "neck": "simple_pyramid",
        "neck_dim": 16,
        "strides": (8, 16),
        "anchor_sizes": (2.0,),
        "proposals_before_nms": (1000, 1000),
        "proposals": (1000, 1000),
        "proposal_nms": 1.0,
        "pool_size": 3,
        "box_dim": 16,
        "score": 0.0,
        "detections": 10,
    },
}
BLOCKS = ("ruby", "grass", "sky")  # the colours of the blocks


def draw(name: str, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 90, (20, 24, 3), dtype=np.uint8)
    row, column = BOXES[name]
    pixels[row : row + 8, column : column + 8] += 150
    return Image.fromarray(pixels)


def make_pictures(root: Path, *, train: int = 8, val: int = 4) -> Path:
    for split, count in (("train", train), ("val", val)):
        for c, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                draw(name, seed=1000 * c + 100 * (split == "val") + i).save(folder / f"{i}.png")
    return root


def draw_shapes(seed: int, labelled: float) -> tuple[Image.Image, Image.Image]:
    """A red disk and a green box on dark ground, and their mask, of which some columns on the left have a
    class."""
    rng = np.random.default_rng(seed)
    height, width = 20 + seed % 3, 26 + seed % 5
    pixels = rng.integers(0, 90, (height, width, 3), dtype=np.uint8)
    ids = np.zeros((height, width), np.uint8)
    rows, columns = np.ogrid[:height, :width]
    y, x = rng.integers(5, height - 5), rng.integers(5, width - 5)
    ids[(rows - y) ** 2 + (columns - x) ** 2 < 25] = 1
    y, x = rng.integers(0, height - 6), rng.integers(0, width - 8)
    ids[y : y + 6, x : x + 8] = 2
    pixels[ids == 1, 0] += 150
    pixels[ids == 2, 1] += 150
    ids[:, round(labelled * width) :] = IGNORED
    return Image.fromarray(pixels), Image.fromarray(ids)


def make_masks(root: Path, *, train: int = 24, val: int = 12) -> Path:
    """Every fourth image has no class at all, the next a column or two: a batch's parts are very unequal."""
    for split, count in (("train", train), ("val", val)):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            image, mask = draw_shapes(100 * (split == "val") + i, (0, 0.06, 0.9, 1)[i % 4])
            image.save(root / "images" / split / f"{i:02d}.png")
            mask.save(root / "masks" / split / f"{i:02d}.png")
    (root / "classes.txt").write_text("\n".join(SHAPES), encoding="utf-8")
    return root


def make_scenes(root: Path, *, train: int = 24, val: int = 12) -> Path:
    """In COCO's format: every image has a block more than the one before, up to three; every fourth none."""
    categories = [{"id": 3 * k + 2, "name": name} for k, name in enumerate(BLOCKS)]
    for split, count in (("train", train), ("val", val)):
        (root / "images" / split).mkdir(parents=True)
        entries, found = [], []
        for i in range(count):
            rng = np.random.default_rng(100 * (split == "val") + i)
            width, height = 26 + i % 5, 22 + i % 3
            pixels = rng.integers(0, 90, (height, width, 3), dtype=np.uint8)
            for k in rng.permutation(3)[: i % 4].tolist():
                w, h = rng.integers(9, 14, 2).tolist()
                x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
                pixels[y : y + h, x : x + w, k] += 150  # each colour once
                about = {"id": len(found) + 1, "image_id": i + 1, "category_id": 3 * k + 2}
                found.append(about | {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0})
            name = f"{split}/{i:02d}.png"
            Image.fromarray(pixels).save(root / "images" / name)
            entries.append({"id": i + 1, "file_name": name, "height": height, "width": width})
        told = {"images": entries, "annotations": found, "categories": categories}
        (root / f"{split}.json").write_text(json.dumps(told), encoding="utf-8")
    return root


# Two towers, whose text tower learns its words from the captions.
TOWERS = VIT | {
    "model": "clip/vit_tiny_patch16",
    "head_fields": {
        "dim": 8,
        "text_dim": 16,
        "text_depth": 1,
        "text_heads": 2,
        "context": 8,
        "vocab_size": 540,
        "templates": ("a square {}",),
    },
}


def make_pairs(root: Path, *, train: int = 24, val: int = 12) -> Path:
    """The bright squares with captions, such as "a square left", and labels."""
    lines = ["file,caption,label,split"]
    for split, count in (("train", train), ("val", val)):
        (root / split).mkdir(parents=True)
        for i in range(count):
            name = CLASSES[i % 3]
            draw(name, seed=100 * (split == "val") + i).save(root / split / f"{i:02d}.png")
            lines.append(f"{split}/{i:02d}.png,a square {name},{name},{split}")
    (root / "pairs.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


# DETR with its mask head, which answers whatever it is sure of; no dropout.
PANOPTIC = VIT | {
    "model": "detr_panoptic/vit_tiny_patch16",
    "head_fields": {
        "dim": 32,
        "num_heads": 8,
        "mlp_dim": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "num_queries": 8,
        "dropout": 0.0,
        "sure": 0.0,
    },
}
KINDS = ("ruby", "grass", "dark")  # the last is stuff: what blocks lie on


def make_segments(root: Path, *, train: int = 24, val: int = 12) -> Path:
    """In COCO's panoptic format: dark ground with up to three blocks on it, a column of no segment at its
    right."""
    categories = [{"id": k + 1, "name": n, "isthing": int(k < 2)} for k, n in enumerate(KINDS)]
    for split, count in (("train", train), ("val", val)):
        (root / "images" / split).mkdir(parents=True)
        (root / f"panoptic_{split}").mkdir()
        entries, told = [], []
        for i in range(count):
            rng = np.random.default_rng(100 * (split == "val") + i)
            width, height = 28 + i % 5, 24 + i % 3
            pixels = rng.integers(0, 90, (height, width, 3), dtype=np.uint8)
            ids = np.full((height, width), 300 + i)
            of = {300 + i: 3}
            for number in range(1, 1 + i % 4):
                w, h = rng.integers(8, 13, 2).tolist()
                x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
                here = np.s_[y : y + h, x : x + w]
                if (ids[here] != 300 + i).any():
                    continue
                pixels[(*here, number % 2)] += 150
                ids[here], of[number] = number, number % 2 + 1
            ids[:, -1] = 0
            name = f"{i:02d}.png"
            Image.fromarray(pixels).save(root / "images" / split / name)
            Image.fromarray(colours_of(ids)).save(root / f"panoptic_{split}" / name)
            entry = {"id": i + 1, "file_name": f"{split}/{name}"}
            entries.append(entry | {"height": height, "width": width})
            about = {"image_id": i + 1, "file_name": name}
            told.append(about | {"segments_info": segments_of(ids, of)})
        document = {"images": entries, "annotations": told, "categories": categories}
        (root / f"panoptic_{split}.json").write_text(json.dumps(document), encoding="utf-8")
    return root


@dataclass(frozen=True)
class Tiny:
    """Settings of a model without BatchNorm, and how a set of 24 images to learn from and 12 to measure on
    is made for it. headline: the score that chooses best/."""

    make: Callable[[Path], Path]
    settings: dict[str, Any]
    headline: str
    classes: tuple[str, ...]


TINY = {
    "classify": Tiny(make_pictures, VIT, "top1", CLASSES),
    "segment": Tiny(make_masks, SEGMENTER, "mIoU", SHAPES),
    "detect": Tiny(make_scenes, DETECTOR, "AP", BLOCKS),
    "panoptic": Tiny(make_segments, PANOPTIC, "PQ", KINDS),
    "contrast": Tiny(make_pairs, TOWERS, "recall", CLASSES),
}
SLOW = ("panoptic",)  # whose own tests are the fast ones


@pytest.fixture(scope="session")
def masks(tmp_path_factory) -> Path:
    return make_masks(tmp_path_factory.mktemp("masks"))


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    return make_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    return make_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="session")
def segments(tmp_path_factory) -> Path:
    return make_segments(tmp_path_factory.mktemp("segments"))


@pytest.fixture(
    scope="session",
    params=[pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in TINY],
)
def tiny(request) -> Tiny:
    """Of each task."""
    return TINY[request.param]


@pytest.fixture(scope="session")
def examples(tiny, pictures, masks, scenes, segments, pairs) -> Path:
    """The data set of `tiny`."""
    made = {"classify": pictures, "segment": masks, "detect": scenes, "contrast": pairs}
    made["panoptic"] = segments
    return next(made[name] for name in TINY if TINY[name] is tiny)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VITRAIL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def tiny_config(data: Path, out: Path, **changes) -> TrainConfig:
    settings = {
        "data": str(data),
        "out": str(out),
        "model": "efficientvit_m0",
        "model_fields": {"dims": [16, 24, 32], "depths": [1, 1, 1], "key_dim": 8},
        "image_size": 32,
        "crop_pct": 1.0,
        "epochs": 2,
        "batch_size": 6,
        "log_every": 2,
        "device": "cpu",
        "augmentation": Augmentation(scale=(0.8, 1.0), flip=0.0),
    }
    return TrainConfig(**(settings | changes))
