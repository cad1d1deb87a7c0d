"""YOLO's text files: a label file beside each image, and data.yaml, which says where the images are and what
the classes are called.

data.yaml gives `train`, `val` and `test`, each a folder, a list of images (.txt), or several of them,
relative to `path` and that to the file's own folder; and `names`, a list or a table from 0 on. The label file
of .../images/x/NAME.jpg is .../labels/x/NAME.txt; where there is no folder `images`, it lies beside the
image.

A line is a class and a box, `K X Y WIDTH HEIGHT` with the centre first, or a class and a polygon,
`K X Y X Y X Y ...`, all in shares of the image's width and height. An image without a label file has no
objects: the format says so.
"""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from vitrail.data.boxes import Boxes, Found, collect, label_of_names
from vitrail.data.folders import SPLIT_NAMES
from vitrail.data.image_files import ImageFiles
from vitrail.data.index import NOWHERE, Index
from vitrail_runtime.errors import InputError, listed
from vitrail_runtime.preprocess import IMAGE_SUFFIXES

YAML_SUFFIXES = (".yaml", ".yml")


def yolo_file(path: Path) -> Path | None:
    """The data.yaml of a folder, under whatever name; None where there is none."""
    found = [p for p in sorted(path.iterdir()) if p.suffix.lower() in YAML_SUFFIXES and p.is_file()]
    found = [p for p in found if _says_yolo(p)]
    if len(found) > 1:
        raise InputError(
            f"{path} has several data sets' files: {listed(p.name for p in found)}; give one of them itself"
        )
    return found[0] if found else None


def is_yolo_folder(path: Path) -> bool:
    """Whether a folder has labels beside its images as YOLO keeps them, though no data.yaml says more."""
    labels = [path / "labels", *(path / name / "labels" for name in SPLIT_NAMES)]
    return any(
        next(folder.rglob("*.txt"), None) is not None for folder in labels if folder.is_dir()
    )


class Yolo(ImageFiles):
    """Images with YOLO's label files. See `vitrail.data.index.Source`. A key is a path below the root."""

    def __init__(self, path: Path) -> None:
        """path: of a data.yaml, or of its folder."""
        file = path if path.is_file() else yolo_file(path)
        if file is None:
            raise InputError(
                f"{path} has label files as YOLO keeps them, but no data.yaml, which names the classes; "
                "write one: `train: images/train`, `val: images/val` and `names: [...]`"
            )
        self.name = str(path)
        self.file = file
        given = read_yaml(file)
        self._names = _names(given, file)
        self.root = self._root(given)
        beside = file.parent
        self._above = beside if beside.absolute() == self.root else self.root
        self._splits = {
            split: given[split] for split in ("train", "val", "test") if given.get(split)
        }
        if not self._splits:
            raise InputError(f"{file} names no images; expected `train`, `val` or `test`")
        self._keys: dict[str, list[str]] = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_keys": {}}  # workers read by key; listings stay here

    def splits(self) -> tuple[str, ...]:
        return tuple(self._splits)

    def classes(self) -> tuple[str, ...]:
        return self._names

    def truth(self, split: str, index: Index, classes: Sequence[str]) -> Boxes:
        without: list[str] = []
        found = list(self._found(index, without))
        used = {self._names[one.label] for one in found if not one.problem}
        label_of = label_of_names(self._names, used, classes, str(self.file))
        places = [label_of.get(name, 0) for name in self._names]
        missing = [k for k in self._listed(split) if not os.path.isfile(self.root / k)]
        notes = []
        if without:
            said = "has no label file and is" if len(without) == 1 else "have no label file and are"
            notes.append(
                f"{len(without):,} of {len(index):,} images of {self.name} {split} {said} taken to show no "
                f"object, as YOLO's format has it: {listed(without, limit=3)}"
            )
        return collect(
            (one._replace(label=places[one.label]) for one in found),
            classes=classes,
            sizes=index.sizes,
            category_ids=range(1, len(classes) + 1),
            image_ids=range(1, len(index) + 1),
            source=f"{self.name} {split}",
            where=lambda i: self.where(index.keys[i], NOWHERE),
            bad=[(self.where(key, NOWHERE), "the file is missing, but listed") for key in missing],
            notes=notes,
        )

    def _found(self, index: Index, without: list[str]) -> Iterator[Found]:
        """The annotations as they are numbered in the file; images without a label file go into `without`."""
        for i, key in enumerate(index.keys):
            labels = _labels_of(key)
            name = self.where(labels, NOWHERE)
            if i in index.problems:
                continue
            if not (self.root / labels).is_file():
                without.append(self.where(key, NOWHERE))
                continue
            height, width = index.sizes[i].tolist()
            lines: dict[str, int] = {}
            for number, line in enumerate(_read_text(self.root / labels, name).splitlines(), 1):
                if not line.strip():
                    continue
                called = f"{name}, line {number}"
                first = lines.setdefault(" ".join(line.split()), number)
                if first < number:
                    yield Found(i, called, problem=f"stands in line {first} already")
                else:
                    yield _read_line(line, i, called, height, width, len(self._names))

    def _root(self, given: dict) -> Path:
        """What the images' folders are relative to: `path`, if anything is there."""
        own = self.file.parent.absolute()
        told = given.get("path")
        if not isinstance(told, str) or not told:
            return own
        root = Path(os.path.normpath(own / told))
        # Written on another machine, or relative to where a tool keeps its data sets.
        return root if root.is_dir() else own

    def _present(self, split: str) -> list[str]:
        return [key for key in self._listed(split) if os.path.isfile(self.root / key)]

    def _listed(self, split: str) -> list[str]:
        if split not in self._keys:
            places = self._splits[split]
            places = places if isinstance(places, list) else [places]
            keys: dict[str, None] = {}
            for place in places:
                if not isinstance(place, str):
                    raise InputError(
                        f"{self.file}: {split} is {place!r}, expected a folder or a list's name"
                    )
                keys |= dict.fromkeys(self._images_of(place, split))
            if not any(os.path.isfile(self.root / key) for key in keys):
                raise InputError(
                    f"{self.file}: no image is in {listed(map(str, places))} of {split}; these are relative "
                    f"to {self._above}"
                )
            self._keys[split] = list(keys)
        return self._keys[split]

    def _images_of(self, place: str, split: str) -> Iterator[str]:
        """Of a folder, all of them at any depth, by name; of a list, in its order."""
        path = self._found_place(place)
        if path.is_dir():
            for where, folders, names in os.walk(path):
                folders[:] = sorted(f for f in folders if not f.startswith("."))
                for name in sorted(names):
                    if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                        yield self._key(Path(where) / name)
        elif path.is_file():
            for line in _read_text(path, str(path)).splitlines():
                if line.strip():
                    # As darknet and ultralytics do: ./ stands for the list's own folder.
                    near = path.parent if line.strip().startswith("./") else self.root
                    yield self._key(near / line.strip())
        else:
            raise InputError(f"{self.file}: {place} of {split} is not there; looked for {path}")

    def _found_place(self, place: str) -> Path:
        """Exports for several tools say ../train/images though the folder lies beside the file."""
        path = self.root / place
        beside = self.root / place.removeprefix("../")
        return beside if not path.exists() and beside.exists() else path

    def _key(self, path: Path) -> str:
        return os.path.relpath(path, self.root).replace(os.sep, "/")


def _labels_of(key: str) -> str:
    """The label file of an image: the last folder `images` of its path is `labels`."""
    *folders, name = key.split("/")
    for i in reversed(range(len(folders))):
        if folders[i] == "images":
            folders[i] = "labels"
            break
    return "/".join([*folders, os.path.splitext(name)[0] + ".txt"])


def _read_line(line: str, image: int, name: str, height: int, width: int, classes: int) -> Found:
    words = line.split()
    try:
        label, *numbers = (float(word) for word in words)
    except ValueError:
        return Found(image, name, problem=f"is {line.strip()[:60]!r}, expected numbers")
    if len(numbers) != 4 and (len(numbers) < 6 or len(numbers) % 2):
        what = f"has {len(words)} numbers; expected a class and a box (5), or a class and 3 points or more"
        return Found(image, name, problem=what)
    if label not in range(classes):
        return Found(
            image, name, problem=f"its class {words[0]} is unknown; known are 0 to {classes - 1}"
        )
    if not all(map(math.isfinite, numbers)):
        return Found(image, name, problem="is not finite (NaN or infinite)")
    if len(numbers) == 4:
        x, y, wide, high = numbers
        if wide < 0 or high < 0 or max(wide, high) > 2 or max(map(abs, (x, y))) > 2:
            what = "is not in shares of the image's width and height, from 0 to 1: pixels, or turned round"
            return Found(image, name, problem=what)
        box = (x - wide / 2) * width, (y - high / 2) * height
        box = (*box, (x + wide / 2) * width, (y + high / 2) * height)
        return Found(image, name, int(label), box)
    if max(map(abs, numbers)) > 2:
        what = "is not in shares of the image's width and height, from 0 to 1, but in pixels"
        return Found(image, name, problem=what)
    points = [
        n * side for n, side in zip(numbers, (width, height) * (len(numbers) // 2), strict=True)
    ]
    xs, ys = points[0::2], points[1::2]
    return Found(image, name, int(label), (min(xs), min(ys), max(xs), max(ys)), mask=[points])


def read_yaml(path: Path) -> dict:
    """What a YAML file holds, a table. Raises InputError where it is none."""
    try:
        given = yaml.safe_load(_read_text(path, str(path)))
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path} is no YAML that can be read: {_in_one_line(error)}") from error
    except RecursionError as error:
        raise InputError(f"{path} is nested too deeply for a data.yaml") from error
    if not isinstance(given, dict):
        raise InputError(
            f"{path} is no data.yaml: expected a table with `train`, `val` and `names`"
        )
    return given


def _says_yolo(path: Path) -> bool:
    """Whether a YAML file beside a data set is YOLO's, by its lines: a broken one is to be told, too."""
    try:
        starts = {
            line.split(":")[0].strip("\"' \ufeff")
            for line in path.read_text("latin-1").splitlines()
        }
    except OSError:
        return False
    starts = {name.removeprefix("\xef\xbb\xbf") for name in starts}
    return "names" in starts and bool(starts & {"train", "val", "test"})


def _read_text(path: Path, name: str) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} is not UTF-8 text ({error.reason}, byte {error.start}); save it as UTF-8"
        ) from error


def _names(given: dict, file: Path) -> tuple[str, ...]:
    names: Any = given.get("names")
    if isinstance(names, dict):
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise InputError(
                f"{file}: names has the numbers {listed(map(str, names))}, expected 0 to {len(names) - 1}"
            )
        names = [names[k] for k in range(len(names))]
    if not isinstance(names, list) or not names:
        raise InputError(
            f"{file} has no `names`; expected a list of class names, or a table from 0 on"
        )
    # A class may be called 7, or yes, which YAML makes a number or a truth value of.
    if not all(isinstance(name, (str, int)) for name in names):
        raise InputError(f"{file}: names are {names!r:.80}, expected text")
    texts = tuple(str(name) for name in names)
    twice = sorted({name for name in texts if texts.count(name) > 1})
    if twice:
        raise InputError(f"{file} names classes twice: {listed(twice)}; give each once")
    count = given.get("nc", len(texts))
    if count != len(texts):
        raise InputError(f"{file} says nc: {count}, but has {len(texts)} names: {listed(texts)}")
    return texts


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())
