"""The embedded data set: 1,797 real handwritten digits, drawn at random scale and place.

The source is the 8 x 8 "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998, UCI, CC BY
4.0). Digits are drawn upscaled, in dark ink on tinted, unevenly lit paper of one of many sizes and shapes:
enough variety that colour, place and size say nothing, small enough to learn on a CPU in minutes. For
classification each is drawn once, alone; for semantic segmentation several stand on a sheet, beside a mask;
for detection and instance segmentation they lie scattered on larger sheets, in COCO's JSON; for panoptic
segmentation such a sheet lies on a table, beside an image of ids; for captions
each is drawn alone in one of some inks, on the left or on the right, as a text beside it says.
"""

import importlib.resources
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitrail.data import rle
from vitrail_runtime.errors import InputError
from vitrail_runtime.panoptic import LARGEST, colours_of, segments_of

SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}  # of each class
SHEETS = {"train": 720, "val": 90, "test": 90}  # for segmentation: each digit is drawn about twice
MOST_ON_A_SHEET = 6
MOST_IN_A_SCENE = 8
EMPTY_SCENE = 25  # one of so many shows paper alone
CLASSES = {  # of a pixel, and its colour
    "background": (32, 36, 44), "0": (230, 25, 75), "1": (60, 180, 75), "2": (255, 225, 25),
    "3": (0, 130, 200), "4": (245, 130, 48), "5": (145, 30, 180), "6": (70, 240, 240),
    "7": (240, 50, 230), "8": (210, 245, 60), "9": (250, 190, 212),
}  # fmt: skip
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INKS = {"red": (200, 20, 20), "green": (10, 130, 40), "blue": (20, 40, 200), "black": (15, 15, 15)}
PLACES = {"on the left": 0.0, "on the right": 1.0}
STUFF = ("paper", "wood", "tiles")  # of panoptic segmentation: what the digits lie on
RIM = (
    0.06,
    0.16,
)  # of a panoptic scene's sides, the ground that is seen on each side of the paper
CAPTIONED = 2  # images of each digit
MARKER = "ABOUT.txt"
ABOUT = """\
Handwritten digits on coloured canvases, drawn by `vitrail data make digits{how}`.

Source: {licence}.
Changes: each 8 x 8 digit was upscaled, coloured and placed on a larger canvas. The splits share no source
    digit.
"""


def make_digits(folder: str | Path, *, task: str = "classify", seed: int = 0) -> Path:
    """Write the digits in one of the forms of SETS.

    "classify": class folders FOLDER/{train,val,test}/{0..9}/NNNN.jpg, 1,797 images in all.
    "semantic": FOLDER/images/{train,val,test}/NNNN.jpg, FOLDER/masks/{train,val,test}/NNNN.png with the class
        of every pixel (background, 0 to 9) and classes.txt, 900 images in all.
    "detect": FOLDER/images/{train,val,test}/NNNN.jpg, and FOLDER/{train,val,test}.json in COCO's format with
        a box around every digit, 900 images in all. "instances": likewise, with the mask of every digit.
    "panoptic": FOLDER/images/{train,val,test}/NNNN.jpg, FOLDER/panoptic_{train,val,test}/NNNN.png with the
        ids of the segments and FOLDER/panoptic_{train,val,test}.json in COCO's panoptic format: digits are
        things, paper and the wooden or tiled ground that it lies on are stuff, 900 images in all.
    "pairs": FOLDER/images/{train,val,test}/NNNN.jpg, and FOLDER/pairs.csv with a caption of each, such as
        "a red seven on the left", and its label ("seven"), 3,594 images in all. In train some captions leave
        out the colour or the place.

    The same seed gives the same files byte for byte (with the same Pillow). Splits are drawn by source
    digit, so none is on two sides. A folder that already holds this set is left as it is; one that holds
    anything else raises InputError. The set appears whole or not at all.
    """
    if task not in SETS:
        raise InputError(f"digits are made for one of {', '.join(SETS)}, but the task is {task!r}")
    folder = Path(folder)
    if ".." in folder.parts:
        # To make the parents of MISSING/../x would make MISSING, through which another x then stands there.
        folder = Path(os.path.realpath(folder))
    images, labels, licence = _source()
    how = "" if task == "classify" else f" --task {task}"
    about = ABOUT.format(licence=licence, how=how) + f"Seed: {seed}\n"
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
        SETS[task].write(partial, images, labels, seed)
        (partial / MARKER).write_text(about, encoding="utf-8")
        partial.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write_alone(folder: Path, images: np.ndarray, labels: np.ndarray, seed: int) -> None:
    for index, split in enumerate(split_digits(labels, seed)):
        target = folder / split / str(labels[index])
        target.mkdir(parents=True, exist_ok=True)
        image = draw_digit(images[index], np.random.default_rng([seed, index]))
        image.save(target / f"{index:04d}.jpg", quality=92)


def _write_sheets(folder: Path, images: np.ndarray, labels: np.ndarray, seed: int) -> None:
    lines = [f"{name} {r} {g} {b}" for name, (r, g, b) in CLASSES.items()]
    (folder / "classes.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for split, rng, drawn in _sets_of_digits(labels, seed, MOST_ON_A_SHEET, _on_a_sheet):
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True)
        for number, mine in enumerate(drawn):
            image, mask = draw_sheet(images[mine], labels[mine], rng)
            image.save(folder / "images" / split / f"{number:04d}.jpg", quality=92)
            mask.save(folder / "masks" / split / f"{number:04d}.png")


def _write_scenes(
    folder: Path, images: np.ndarray, labels: np.ndarray, seed: int, *, masks: bool = False
) -> None:
    categories = [{"id": k + 1, "name": str(k)} for k in range(10)]
    for split, rng, drawn in _sets_of_digits(labels, seed, MOST_IN_A_SCENE, _in_a_scene):
        (folder / "images" / split).mkdir(parents=True)
        entries: list[dict[str, Any]] = []
        found: list[dict[str, Any]] = []
        for number, mine in enumerate(drawn, 1):
            image, placed = draw_scene(images[mine], labels[mine], rng)
            name = f"{split}/{number:04d}.jpg"
            image.save(folder / "images" / name, quality=92)
            entry = {"id": number, "file_name": name, "height": image.height, "width": image.width}
            entries.append(entry)
            for digit in placed:
                about = {"id": len(found) + 1, "image_id": number, "iscrowd": 0}
                found.append(about | _annotation(digit, image.size, masks=masks))
        told = {"images": entries, "annotations": found, "categories": categories}
        (folder / f"{split}.json").write_text(json.dumps(told), encoding="utf-8")


def _write_panoptic(folder: Path, images: np.ndarray, labels: np.ndarray, seed: int) -> None:
    names = [(str(k), 1) for k in range(10)] + [(name, 0) for name in STUFF]
    categories = [{"id": n + 1, "name": k, "isthing": thing} for n, (k, thing) in enumerate(names)]
    for split, rng, drawn in _sets_of_digits(labels, seed, MOST_IN_A_SCENE, _in_a_scene):
        (folder / "images" / split).mkdir(parents=True)
        (folder / f"panoptic_{split}").mkdir()
        entries: list[dict[str, Any]] = []
        found: list[dict[str, Any]] = []
        for number, mine in enumerate(drawn, 1):
            image, ids, kinds = draw_panoptic(images[mine], labels[mine], rng)
            name = f"{number:04d}"
            image.save(folder / "images" / split / f"{name}.jpg", quality=92)
            Image.fromarray(colours_of(ids)).save(folder / f"panoptic_{split}" / f"{name}.png")
            entry = {"id": number, "file_name": f"{split}/{name}.jpg"}
            entries.append(entry | {"height": image.height, "width": image.width})
            segments = segments_of(ids, {i: kind + 1 for i, kind in kinds.items()})
            about = {"image_id": number, "file_name": f"{name}.png"}
            found.append(about | {"segments_info": segments})
        told = {"images": entries, "annotations": found, "categories": categories}
        (folder / f"panoptic_{split}.json").write_text(json.dumps(told), encoding="utf-8")


def _write_pairs(folder: Path, images: np.ndarray, labels: np.ndarray, seed: int) -> None:
    lines = ["file,caption,label,split"]
    for split in SHARES:
        (folder / "images" / split).mkdir(parents=True)
    for index, split in enumerate(split_digits(labels, seed)):
        rng = np.random.default_rng([seed, index])
        for number in range(index * CAPTIONED, (index + 1) * CAPTIONED):
            word = WORDS[labels[index]]
            image, caption = draw_captioned(images[index], word, rng)
            if split == "train" and number % CAPTIONED:
                caption = _shorter(caption, word, rng)
            name = f"images/{split}/{number:04d}.jpg"
            image.save(folder / name, quality=92)
            lines.append(f"{name},{caption},{word},{split}")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _shorter(caption: str, word: str, rng: np.random.Generator) -> str:
    """A caption as people write them: some leave the colour out, some the place, some both."""
    before, after = caption.split(f" {word} ")
    colour, place = rng.integers(2, size=2)
    return f"{before if colour else 'a'} {word}" + (f" {after}" if place else "")


def _annotation(digit: "Placed", size: tuple[int, int], *, masks: bool) -> dict[str, Any]:
    """A digit as COCO writes it; its area is that of the mask only where there is one."""
    high, wide = digit.strokes.shape
    box = [digit.left, digit.top, wide, high]
    told: dict[str, Any] = {"category_id": digit.label + 1, "bbox": box, "area": wide * high}
    if masks:
        width, height = size
        mask = np.zeros((height, width), bool)
        mask[digit.top : digit.top + high, digit.left : digit.left + wide] = digit.strokes
        packed = rle.from_mask(mask).decode()
        told["segmentation"] = {"size": [height, width], "counts": packed}
        told["area"] = int(mask.sum())
    return told


def _on_a_sheet(rng: np.random.Generator) -> int:
    return int(rng.integers(2, MOST_ON_A_SHEET + 1))


def _in_a_scene(rng: np.random.Generator) -> int:
    return 0 if rng.integers(EMPTY_SCENE) == 0 else int(rng.integers(1, MOST_IN_A_SCENE + 1))


def _sets_of_digits(
    labels: np.ndarray, seed: int, most: int, count: Callable[[np.random.Generator], int]
) -> Iterator[tuple[str, np.random.Generator, Iterator[list[int]]]]:
    """For each split: its name, its random numbers, and the digits of each of its images in turn, `count`
    of them and `most` at most."""
    splits = np.array(split_digits(labels, seed))
    for place, (split, images) in enumerate(SHEETS.items()):
        rng = np.random.default_rng([seed, len(labels), place])
        yield split, rng, _dealt(np.flatnonzero(splits == split), images, rng, most, count)


def _dealt(
    digits: np.ndarray,
    images: int,
    rng: np.random.Generator,
    most: int,
    count: Callable[[np.random.Generator], int],
) -> Iterator[list[int]]:
    waiting: list[int] = []
    for _ in range(images):
        if len(waiting) < most:  # every digit once, then all of them again
            waiting += rng.permutation(digits).tolist()
        wanted = count(rng)
        mine, waiting = waiting[:wanted], waiting[wanted:]
        yield mine


@dataclass(frozen=True)
class DigitSet:
    """A form of the digits: what writes it, what it is called, and a model that learns it in minutes."""

    write: Callable[[Path, np.ndarray, np.ndarray, int], None]
    what: str
    model: str


SETS = {  # by what they are made for
    "classify": DigitSet(_write_alone, "1,797 handwritten digits", "efficientvit_m0"),
    "semantic": DigitSet(
        _write_sheets,
        "900 sheets of handwritten digits with masks",
        "semantic_fpn/efficientvit_m0",
    ),
    "detect": DigitSet(
        _write_scenes,
        "900 scenes of handwritten digits with boxes",
        "faster_rcnn/efficientvit_m0",
    ),
    "instances": DigitSet(
        partial(_write_scenes, masks=True),
        "900 scenes of handwritten digits with boxes and masks",
        "mask_rcnn/efficientvit_m0",
    ),
    "panoptic": DigitSet(
        _write_panoptic,
        "900 scenes of handwritten digits on paper and ground, with segments",
        "detr_panoptic/efficientvit_m0",
    ),
    "pairs": DigitSet(
        _write_pairs,
        "3,594 handwritten digits with captions",
        "clip/efficientvit_m0",
    ),
}


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
    alpha = _strokes(ink, round(min(height, width) * rng.uniform(0.7, 1.0)), rng)
    top = int(rng.integers(0, height - alpha.shape[0] + 1))
    left = int(rng.integers(0, width - alpha.shape[1] + 1))
    _lay(canvas[top : top + alpha.shape[0], left : left + alpha.shape[1]], pen, alpha)
    return _noisy(canvas, rng)


def draw_captioned(ink: np.ndarray, word: str, rng: np.random.Generator) -> tuple[Image.Image, str]:
    """One image of a digit, wider than tall, and what is on it: its colour, its name and its place."""
    colour, place = (list(names)[int(rng.integers(len(names)))] for names in (INKS, PLACES))
    height = int(rng.integers(56, 97))
    width = round(height * rng.uniform(1.3, 1.6))
    canvas = rng.uniform(190, 245) + rng.uniform(-8, 8, 3) + _shading(height, width, rng) / 2
    alpha = _strokes(ink, round(height * rng.uniform(0.75, 0.95)), rng)
    top = int(rng.integers(0, height - alpha.shape[0] + 1))
    left = round((width - alpha.shape[1]) * PLACES[place])
    here = canvas[top : top + alpha.shape[0], left : left + alpha.shape[1]]
    _lay(here, np.array(INKS[colour]) + rng.uniform(-12, 12, 3), alpha)
    return _noisy(canvas, rng), f"a {colour} {word} {place}"


def draw_sheet(
    inks: np.ndarray, labels: np.ndarray, rng: np.random.Generator
) -> tuple[Image.Image, Image.Image]:
    """Digits side by side on one sheet, and the mask of their strokes: label + 1, else 0, with a palette.

    `inks` is (n, 8, 8); height is 72 to 144 pixels, width 72 to 168. A digit that finds no free place is left
    out; the first always has one.
    """
    height = int(rng.integers(72, 145))
    width = int(np.clip(round(height * np.exp(rng.uniform(-0.35, 0.35))), 72, 168))
    canvas, placed = _scattered(inks, labels, height, width, (0.4, 0.65), rng)
    mask = np.zeros((height, width), np.uint8)
    for digit in placed:
        high, wide = digit.strokes.shape
        here = mask[digit.top : digit.top + high, digit.left : digit.left + wide]
        here[digit.strokes] = digit.label + 1
    shown = Image.fromarray(mask)
    shown.putpalette([c for colour in CLASSES.values() for c in colour])
    return _noisy(canvas, rng), shown


@dataclass(frozen=True)
class Placed:
    """A digit on a sheet. strokes: (height, width) bool of the box around it; top, left: of the box."""

    label: int
    top: int
    left: int
    strokes: np.ndarray


def draw_scene(
    inks: np.ndarray, labels: np.ndarray, rng: np.random.Generator
) -> tuple[Image.Image, list[Placed]]:
    """Digits scattered on a larger sheet, small ones and large ones, and where each of them lies.

    `inks` is (n, 8, 8); height is 112 to 192 pixels, width 112 to 224. A digit that finds no free place is
    left out; the first always has one.
    """
    height = int(rng.integers(112, 193))
    width = int(np.clip(round(height * np.exp(rng.uniform(-0.35, 0.35))), 112, 224))
    canvas, placed = _scattered(inks, labels, height, width, (0.15, 0.45), rng)
    return _noisy(canvas, rng), placed


def draw_panoptic(
    inks: np.ndarray, labels: np.ndarray, rng: np.random.Generator
) -> tuple[Image.Image, np.ndarray, dict[int, int]]:
    """A sheet of digits on wood or on tiles: the image, ids of its segments (height, width), and of each id
    its class: a digit, or 10 and more for STUFF.

    The sheet is as in `draw_scene`, with ground on each side of it, a share (RIM) of its own. Ids are random.
    """
    height = int(rng.integers(112, 177))
    width = int(np.clip(round(height * np.exp(rng.uniform(-0.3, 0.3))), 112, 200))
    canvas, placed = _scattered(inks, labels, height, width, (0.2, 0.45), rng)
    top, bottom, left, right = (
        round(side * rng.uniform(*RIM)) for side in (height, height, width, width)
    )
    ground = int(rng.integers(2))
    whole = _ground(height + top + bottom, width + left + right, STUFF[1 + ground], rng)
    whole[top : top + height, left : left + width] = canvas
    numbers = rng.choice(LARGEST, len(placed) + 2, replace=False) + 1
    ids = np.full(whole.shape[:2], numbers[0], np.int32)
    ids[top : top + height, left : left + width] = numbers[1]
    for digit, number in zip(placed, numbers[2:], strict=True):
        high, wide = digit.strokes.shape
        y, x = top + digit.top, left + digit.left
        ids[y : y + high, x : x + wide][digit.strokes] = number
    kinds = [11 + ground, 10, *(digit.label for digit in placed)]
    return _noisy(whole, rng), ids, dict(zip(numbers.tolist(), kinds, strict=True))


def _ground(height: int, width: int, kind: str, rng: np.random.Generator) -> np.ndarray:
    """What a sheet lies on: boards with grain, or square tiles with joints; of many colours."""
    y, x = np.mgrid[0:height, 0:width]
    if rng.integers(2):
        y, x = x, y
    base = rng.uniform(60, 170) + rng.uniform(-40, 40, 3)
    step = int(rng.integers(14, 31))
    joints = (y + int(rng.integers(step))) % step < 2
    if kind == "tiles":
        joints |= (x + int(rng.integers(step))) % step < 2
        texture = 14.0 * ((y // step + x // step) % 2)
    else:
        texture = 9 * np.sin(y * rng.uniform(0.9, 1.6) + 2 * np.sin(x / rng.uniform(12, 30)))
    canvas = base + texture[..., None] + _shading(height, width, rng)
    canvas[joints] -= 45
    return canvas


def _scattered(
    inks: np.ndarray,
    labels: np.ndarray,
    height: int,
    width: int,
    share: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[np.ndarray, list[Placed]]:
    """Digits on paper, none over another, each within `share` of the short side; and where they lie."""
    canvas = rng.uniform(170, 245) + rng.uniform(-25, 25, 3) + _shading(height, width, rng)
    taken = np.zeros((height, width), bool)
    placed = []
    for ink, label in zip(inks, labels.tolist(), strict=True):
        pen = rng.uniform(10, 85) + rng.uniform(-35, 35, 3)
        alpha = _strokes(ink, round(min(height, width) * rng.uniform(*share)), rng)
        rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
        alpha = alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        high, wide = alpha.shape
        for _ in range(30):
            top = int(rng.integers(0, height - high + 1))
            left = int(rng.integers(0, width - wide + 1))
            here = np.s_[top : top + high, left : left + wide]
            if not taken[here].any():
                taken[here] = True
                _lay(canvas[here], pen, alpha)
                placed.append(_tight(label, top, left, alpha > 0.3))
                break
    return canvas, placed


def _tight(label: int, top: int, left: int, strokes: np.ndarray) -> Placed:
    """In the smallest box around its strokes."""
    rows, columns = np.flatnonzero(strokes.any(1)), np.flatnonzero(strokes.any(0))
    inner = strokes[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return Placed(label, top + int(rows[0]), left + int(columns[0]), inner)


def _strokes(ink: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """How much ink lies where, 0 to 1: a digit drawn `side` pixels high, a little narrower and turned."""
    size = (max(1, round(side * rng.uniform(0.8, 1.0))), side)
    # In mode F: 8-bit steps of 0..16 would show as terraces after an eightfold upscale.
    # The frame of one pixel keeps the strokes whole when the digit is turned.
    glyph = Image.fromarray(np.pad(ink, 1).astype(np.float32) / 16)
    glyph = glyph.resize(size, Image.Resampling.BICUBIC)
    glyph = glyph.rotate(rng.uniform(-10, 10), Image.Resampling.BICUBIC)
    return np.clip(1.6 * np.asarray(glyph) - 0.2, 0, 1)


def _lay(place: np.ndarray, pen: np.ndarray, alpha: np.ndarray) -> None:
    place[:] = place * (1 - alpha[..., None]) + pen * alpha[..., None]


def _noisy(canvas: np.ndarray, rng: np.random.Generator) -> Image.Image:
    canvas = canvas + rng.normal(0, rng.uniform(1, 10), canvas.shape)
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
