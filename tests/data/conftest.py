"""Small data sets on disk, and a cache of each test's own."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("VITRAIL_CACHE", str(folder))
    return folder


def picture(number: int, size: tuple[int, int] = (20, 30)) -> Image.Image:
    """A picture of its own for each number; `size` is (height, width)."""
    rng = np.random.default_rng(number)
    small = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size[1], size[0]), Image.Resampling.BICUBIC)


@pytest.fixture
def class_folders(tmp_path) -> Callable[..., Path]:
    """class_folders({"train": {"cat": 3, "dog": 2}, ...}) writes pictures and returns the root."""

    def make(splits: dict[str, dict[str, int]], root: Path = tmp_path / "set") -> Path:
        number = 0
        for split, classes in splits.items():
            for name, count in classes.items():
                folder = root / split / name
                folder.mkdir(parents=True, exist_ok=True)
                for i in range(count):
                    number += 1
                    size = (20 + number % 3, 30 + number % 5)
                    picture(number, size).save(folder / f"{i:03d}.jpg", quality=90)
        return root

    return make
