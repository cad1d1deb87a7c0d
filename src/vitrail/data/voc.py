"""Pascal VOC's XML: ROOT/Annotations/NAME.xml for ROOT/JPEGImages/NAME.jpg, and lists of names in
ROOT/ImageSets/Main.

A list stands for a split where its whole name is that of one: train.txt, val.txt, test.txt; trainval.txt is
train where there is no other. Without lists, all annotated images are one set. Corners are counted from one
and belong to the box: xmin 1 is the image's left edge, xmax the right edge of the last pixel. What is marked
difficult becomes a crowd: it is not taught, and neither missed nor counted when it is found.
"""

import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

from vitrail.data.boxes import Boxes, Found, collect, label_of_names
from vitrail.data.folders import SPLIT_NAMES
from vitrail.data.image_files import ImageFiles
from vitrail.data.index import NOWHERE, Index, Place
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import IMAGE_SUFFIXES

IMAGES = ("JPEGImages", "images", "Images")
EVERYTHING = ""  # the split of a set without lists


def is_voc_folder(path: Path) -> bool:
    """Whether a folder holds XML files in Annotations."""
    return next((path / "Annotations").glob("*.xml"), None) is not None


class Voc(ImageFiles):
    """Images whose objects stand in XML files. See `vitrail.data.index.Source`. A key is a path below the
    root."""

    def __init__(self, root: Path) -> None:
        self.name = str(root)
        self.root = root.absolute()
        self._lists = _lists(self.root / "ImageSets" / "Main")
        folder = next((name for name in IMAGES if (root / name).is_dir()), None)
        if folder is None:
            raise InputError(
                f"{root} has annotations, but no images; expected them in {root / IMAGES[0]}"
            )
        self.folder = folder

    def __getstate__(self) -> dict:
        kept = {k: v for k, v in self.__dict__.items() if k not in ("_files", "_classes")}
        return kept  # workers read by key; listings stay here

    def splits(self) -> tuple[str, ...]:
        return tuple(s for s in ("train", "val", "test") if s in self._lists) or (EVERYTHING,)

    def classes(self) -> tuple[str, ...]:
        return self._classes

    @cached_property
    def _classes(self) -> tuple[str, ...]:
        """Every name that stands in an annotation of any split, sorted."""
        found: set[str] = set()
        for split in self.splits():
            for name in self._names(split):
                try:
                    found |= {label for label, *_ in _objects(self._read_xml(name)) if label}
                except BadFile:  # which `truth` names
                    continue
        if not found:
            raise InputError(
                f"{self.name} has no annotation at all; images without objects are fine beside others, but "
                "at least one object is needed"
            )
        return tuple(sorted(found))

    def where(self, key: str, place: Place) -> str:
        return str(Path(self.name) / key)

    def truth(self, split: str, index: Index, classes: Sequence[str]) -> Boxes:
        annotated = self._annotated(split)
        problems: dict[int, tuple[str, str]] = {}
        found = list(self._found(annotated, index, problems))
        used = {name for name, _ in found}
        label_of = label_of_names(self.classes(), used, classes, f"{self.name} {split}".strip())
        return collect(
            (one._replace(label=label_of.get(name, 0)) for name, one in found),
            classes=classes,
            sizes=index.sizes,
            category_ids=range(1, len(classes) + 1),
            image_ids=range(1, len(index) + 1),
            source=f"{self.name} {split}".strip(),
            where=lambda i: self.where(index.keys[i], NOWHERE),
            bad=list(self._absent(split)),
            problems=problems,
        )

    def _found(
        self,
        annotated: list[tuple[str, str]],
        index: Index,
        problems: dict[int, tuple[str, str]],
    ) -> Iterator[tuple[str, Found]]:
        """The name of each object's class, and the object."""
        for i, (name, _) in enumerate(annotated):
            where = str(Path(self.name) / "Annotations" / f"{name}.xml")
            if i in index.problems:
                continue
            try:
                root = self._read_xml(name)
            except BadFile as error:
                problems[i] = (where, str(error))
                continue
            height, width = index.sizes[i].tolist()
            said = _number(root, "size/height"), _number(root, "size/width")
            if all(said) and said != (height, width):
                problems[i] = (
                    where,
                    f"is for an image of {said[0]:g} x {said[1]:g} (height x width), but "
                    f"{self.where(index.keys[i], NOWHERE)} is {height} x {width}",
                )
                continue
            for number, (label, box, difficult, problem) in enumerate(_objects(root), 1):
                called = f"{where}, object {number}"
                yield label, Found(i, called, box=box, crowd=difficult, problem=problem)

    def _read_xml(self, name: str) -> ElementTree.Element:
        try:
            return ElementTree.fromstring((self.root / "Annotations" / f"{name}.xml").read_bytes())
        except OSError as error:
            raise BadFile(f"cannot be read: {error.strerror or error}") from error
        except (ElementTree.ParseError, ValueError, LookupError, RecursionError) as error:
            raise BadFile(
                f"is no whole XML: {error}; was it written to its end, and in the encoding that it declares "
                "(UTF-8 where it declares none)?"
            ) from error

    def _names(self, split: str) -> list[str]:
        if split == EVERYTHING:
            return sorted(path.stem for path in (self.root / "Annotations").glob("*.xml"))
        path = self._lists[split]
        try:
            lines = path.read_bytes().decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8"
            ) from error
        names = [line.split()[0] for line in lines if line.strip()]
        names = [n.removesuffix(Path(n).suffix) if _is_image(n) else n for n in names]
        if not names:
            raise InputError(f"{path} lists no images")
        return list(dict.fromkeys(names))

    @cached_property
    def _files(self) -> dict[str, str]:
        """Image files by name without ending."""
        names = sorted(os.listdir(self.root / self.folder))
        return {Path(name).stem: name for name in names if _is_image(name)}

    def _present(self, split: str) -> list[str]:
        return [key for _, key in self._annotated(split)]

    def _annotated(self, split: str) -> list[tuple[str, str]]:
        """(name, key) of images that have an annotation."""
        return [
            (name, f"{self.folder}/{self._files[name]}")
            for name in self._names(split)
            if name in self._files and (self.root / "Annotations" / f"{name}.xml").is_file()
        ]

    def _absent(self, split: str) -> Iterator[tuple[str, str]]:
        for name in self._names(split):
            listed = f"{self._lists[split].name} lists {name}" if split else f"{name} is annotated"
            if name not in self._files:
                yield (
                    str(Path(self.name) / self.folder / f"{name}.jpg"),
                    f"the file is missing; {listed}",
                )
            elif not (self.root / "Annotations" / f"{name}.xml").is_file():
                yield (
                    str(Path(self.name) / "Annotations" / f"{name}.xml"),
                    f"the file is missing; {listed}, and VOC has one for every image",
                )


class BadFile(ValueError):
    """Says what is wrong with it."""


def _lists(folder: Path) -> dict[str, Path]:
    """split -> file of names."""
    found = {path.stem.lower(): path for path in sorted(folder.glob("*.txt"))}
    splits = {SPLIT_NAMES[name]: path for name, path in found.items() if name in SPLIT_NAMES}
    if "train" not in splits and "trainval" in found:
        splits["train"] = found["trainval"]
    return splits


def _objects(
    root: ElementTree.Element,
) -> Iterator[tuple[str, tuple[float, float, float, float] | None, bool, str]]:
    """Class, corners from the image's edge on, whether it is difficult, and what is wrong."""
    for given in root.findall("object"):
        label = (given.findtext("name") or "").strip()
        corners = [_number(given, f"bndbox/{name}") for name in ("xmin", "ymin", "xmax", "ymax")]
        difficult = _number(given, "difficult") == 1
        if not label:
            yield "", None, difficult, "has no name of a class"
        elif None in corners:
            yield label, None, difficult, "has no bndbox of the numbers xmin, ymin, xmax and ymax"
        else:
            left, top, right, bottom = (c or 0.0 for c in corners)
            yield label, (left - 1, top - 1, right, bottom), difficult, ""


def _number(root: ElementTree.Element, path: str) -> float | None:
    try:
        return float(root.findtext(path) or "")
    except ValueError:
        return None


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in IMAGE_SUFFIXES
