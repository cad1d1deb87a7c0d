"""A tiny set of pictures that a tiny model learns within seconds: bright squares on the left or the right."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitrail.data.augmentation import Augmentation
from vitrail.train.config import TrainConfig

CLASSES = ("left", "right", "top")
BOXES = {"left": (6, 1), "right": (6, 15), "top": (1, 8)}  # (row, column) of the square

# A plain vision transformer without BatchNorm, small enough for a test.
VIT = {
    "model": "vit_tiny_patch16",
    "model_fields": {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8},
}


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
