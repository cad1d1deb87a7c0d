"""Small sets of images with masks, written for one test."""

import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from tests.data.conftest import picture
from vitrail.data.mask_folders import MaskFolders
from vitrail.data.masks import ClassMaps, read_class_maps


def random_ids(number: int, size: tuple[int, int], classes: int = 3) -> np.ndarray:
    """(H, W) uint8 of 0..classes-1, each of them present."""
    ids = np.random.default_rng(number).integers(0, classes, size, np.uint8)
    ids.reshape(-1)[:classes] = np.arange(classes)
    return ids


def write_pair(
    root: Path, name: str, mask: np.ndarray | Image.Image, split: str = "train", **more
) -> None:
    """An image images/SPLIT/NAME.jpg of the mask's size, and its mask masks/SPLIT/NAME.png."""
    image = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
    for folder in ("images", "masks"):
        (root / folder / split).mkdir(parents=True, exist_ok=True)
    shown = picture(zlib.crc32(f"{split}/{name}".encode()), (image.height, image.width))
    shown.save(root / "images" / split / f"{name}.jpg", quality=90, **more)
    image.save(root / "masks" / split / f"{name}.png")


def mask_set(
    root: Path, splits: dict[str, int], classes: int = 3, size: tuple[int, int] = (20, 30)
) -> Path:
    """`splits` says how many images; ("": without splits). classes.txt calls the classes a, b, c, ..."""
    number = 0
    for split, count in splits.items():
        for i in range(count):
            number += 1
            shape = (size[0] + number % 3, size[1] + number % 5)
            write_pair(root, f"{i:03d}", random_ids(number, shape, classes), split)
    names = "\n".join("abcdefghijklmnop"[k] for k in range(classes))
    (root / "classes.txt").write_text(names + "\n", encoding="utf-8")
    return root


def class_maps(
    source: MaskFolders, split: str = "train", classes: tuple[str, ...] | None = None
) -> tuple[ClassMaps, dict[int, tuple[str, str]], tuple[str, ...]]:
    """Class maps, problems and notes."""
    maps = read_class_maps(source, split, classes)
    return maps, maps.problems, maps.notes
