"""The embedded data set: 1,797 real handwritten digits, drawn at random scale and place.

The source is the 8 x 8 "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998, UCI, CC BY
4.0). Each digit is drawn once, upscaled, in dark ink on tinted, unevenly lit paper of one of many sizes and
shapes: enough variety that colour, place and size say nothing, small enough to learn on a CPU in minutes.
"""

import importlib.resources
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from vitrail_runtime.errors import InputError

SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}  # of each class
MARKER = "ABOUT.txt"
ABOUT = """\
Handwritten digits on coloured canvases, drawn by `vitrail data make digits`.

Source: {licence}.
Changes: each 8 x 8 digit was upscaled, coloured and placed on a larger canvas. The splits share no source
    digit.
"""


def make_digits(folder: str | Path, *, seed: int = 0) -> Path:
    """Write the digits as class folders: FOLDER/{train,val,test}/{0..9}/NNNN.jpg, 1,797 pictures in all.

    The same seed gives the same files byte for byte (with the same Pillow). Splits are drawn by source
    digit, so none is on two sides. A folder that already holds this set is left as it is; one that holds
    anything else raises InputError. The set appears whole or not at all.
    """
    folder = Path(folder)
    if ".." in folder.parts:
        # To make the parents of MISSING/../x would make MISSING, through which another x then stands there.
        folder = Path(os.path.realpath(folder))
    images, labels, licence = _source()
    about = ABOUT.format(licence=licence) + f"Seed: {seed}\n"
    if folder.exists():
        if not folder.is_dir():
            raise InputError(f"{folder} is a file; give a new folder for the digits")
        marker = folder / MARKER
        if marker.is_file() and marker.read_text(encoding="utf-8") == about:
            return folder
        if any(folder.iterdir()):
            raise InputError(
                f"{folder} is not empty and does not hold these digits; give a new folder"
            )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise InputError(f"{folder} cannot be made: {error.strerror}: {error.filename}") from error
    try:
        for index, split in enumerate(split_digits(labels, seed)):
            target = partial / split / str(labels[index])
            target.mkdir(parents=True, exist_ok=True)
            picture = draw_digit(images[index], np.random.default_rng([seed, index]))
            picture.save(target / f"{index:04d}.jpg", quality=92)
        (partial / MARKER).write_text(about, encoding="utf-8")
        partial.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def split_digits(labels: np.ndarray, seed: int) -> list[str]:
    """The split of each source digit, by class in the proportions of SHARES."""
    splits = [""] * len(labels)
    order = np.random.default_rng([seed, len(labels)]).permutation(len(labels))
    for label in np.unique(labels):
        mine = order[labels[order] == label]
        first = round(SHARES["train"] * len(mine))
        second = first + round(SHARES["val"] * len(mine))
        for i in mine:
            splits[i] = "train"
        for i in mine[first:second]:
            splits[i] = "val"
        for i in mine[second:]:
            splits[i] = "test"
    return splits


def draw_digit(ink: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """One picture of a digit: `ink` is (8, 8) of 0..16; height and width are 56 to 144 pixels."""
    height = int(rng.integers(56, 129))
    width = int(np.clip(round(height * np.exp(rng.uniform(-0.35, 0.35))), 56, 144))
    paper = rng.uniform(170, 245) + rng.uniform(-25, 25, 3)
    pen = rng.uniform(10, 85) + rng.uniform(-35, 35, 3)
    canvas = paper + _shading(height, width, rng)
    side = round(min(height, width) * rng.uniform(0.7, 1.0))
    stretch = rng.uniform(0.8, 1.0)  # digits are a little narrower than their frame
    size = (max(1, round(side * stretch)), side)
    # In mode F: 8-bit steps of 0..16 would show as terraces after an eightfold upscale.
    # The frame of one pixel keeps the strokes whole when the digit is turned.
    glyph = Image.fromarray(np.pad(ink, 1).astype(np.float32) / 16)
    glyph = glyph.resize(size, Image.Resampling.BICUBIC)
    glyph = glyph.rotate(rng.uniform(-10, 10), Image.Resampling.BICUBIC)
    alpha = np.clip(1.6 * np.asarray(glyph) - 0.2, 0, 1)[..., None]
    top = int(rng.integers(0, height - size[1] + 1))
    left = int(rng.integers(0, width - size[0] + 1))
    place = canvas[top : top + size[1], left : left + size[0]]
    place[:] = place * (1 - alpha) + pen * alpha
    canvas += rng.normal(0, rng.uniform(1, 10), canvas.shape)
    return Image.fromarray(np.clip(np.rint(canvas), 0, 255).astype(np.uint8))


def _shading(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Light from one side and soft blotches: (height, width, 3) around zero."""
    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0, 50)
    y, x = np.mgrid[0:height, 0:width]
    along = (x / width - 0.5) * np.cos(angle) + (y / height - 0.5) * np.sin(angle)
    blotches = Image.fromarray(rng.normal(0, 7, (5, 5)).astype(np.float32))
    blotches = blotches.resize((width, height), Image.Resampling.BICUBIC)
    shade = strength * along + np.asarray(blotches)
    return shade[..., None] + np.zeros(3)


def _source() -> tuple[np.ndarray, np.ndarray, str]:
    path = importlib.resources.files("vitrail.data") / "digits.npz"
    with path.open("rb") as file, np.load(file) as stored:
        return stored["images"], stored["labels"], str(stored["licence"])
